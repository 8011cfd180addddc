#pragma once

#include <napi.h>

#include <memory>

#include "core/channel.h"
#include "core/event_set.h"

/** `Channel` of src/native.ts. */
class ChannelObject : public Napi::ObjectWrap<ChannelObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit ChannelObject(const Napi::CallbackInfo& info);
  ~ChannelObject() override { shut(); }

 private:
  void shut();
  Napi::Value token(const Napi::CallbackInfo& info);
  Napi::Value peer(const Napi::CallbackInfo& info);
  void closePeer(const Napi::CallbackInfo& info);
  void send(const Napi::CallbackInfo& info);
  Napi::Value receive(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  std::shared_ptr<reprieve::EventSet> events_;
  int32_t token_ = 0;
  reprieve::Channel channel_;
  reprieve::Fd peer_;
};
