#pragma once

#include <napi.h>

#include <memory>

#include "core/event_set.h"
#include "loop_poll.h"

/** `EventSet` of src/native.ts: the set's epoll descriptor, polled by the environment's own event loop. */
class EventSetObject final : public Napi::ObjectWrap<EventSetObject>, private LoopOwner {
 public:
  static constexpr napi_type_tag kTag = {0x7265707269657665, 3};
  static constexpr const char* kExpected = "an EventSet";

  static Napi::Function define(Napi::Env env);
  explicit EventSetObject(const Napi::CallbackInfo& info);
  ~EventSetObject() override { shut(); }

  /** The set; null, with `ERR_REPRIEVE_CLOSED` pending, when it is closed. */
  const std::shared_ptr<reprieve::EventSet>* use(Napi::Env env) const;

 private:
  void wake() override;
  void shut() override;

  Napi::Value addCgroupEvent(const Napi::CallbackInfo& info);
  Napi::Value watchFile(const Napi::CallbackInfo& info);
  Napi::Value watchDirectory(const Napi::CallbackInfo& info);
  Napi::Value readDirectoryEvents(const Napi::CallbackInfo& info);
  static std::optional<int32_t> tokenArgument(const Napi::CallbackInfo& info);
  void trigger(const Napi::CallbackInfo& info);
  void remove(const Napi::CallbackInfo& info);
  Napi::Value size(const Napi::CallbackInfo& info);
  void ref(const Napi::CallbackInfo& info);
  void unref(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  std::shared_ptr<reprieve::EventSet> set_;
  LoopPoll* poll_ = nullptr;
  Napi::Reference<Napi::TypedArray> ready_;
  Napi::FunctionReference onReady_;
  std::unique_ptr<Napi::AsyncContext> context_;
};
