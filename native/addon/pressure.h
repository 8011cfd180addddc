#pragma once

#include <napi.h>

#include <memory>

#include "core/fd.h"
#include "loop_poll.h"

/** `PressureTrigger` of src/native.ts: polled by the event loop itself, as an event is lost in a nested epoll set. */
class PressureTriggerObject final : public Napi::ObjectWrap<PressureTriggerObject>, private LoopOwner {
 public:
  static Napi::Function define(Napi::Env env);
  explicit PressureTriggerObject(const Napi::CallbackInfo& info);
  ~PressureTriggerObject() override { shut(); }

 private:
  void wake() override;
  void shut() override;

  bool use(Napi::Env env) const;
  void ref(const Napi::CallbackInfo& info);
  void unref(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  reprieve::Fd file_;
  LoopPoll* poll_ = nullptr;
  Napi::FunctionReference onEvent_;
  std::unique_ptr<Napi::AsyncContext> context_;
};
