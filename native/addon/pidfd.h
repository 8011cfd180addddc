#pragma once

#include <napi.h>

#include "core/pidfd.h"

/** `Pidfd` of src/native.ts. */
class PidfdObject : public Napi::ObjectWrap<PidfdObject> {
 public:
  static constexpr napi_type_tag kTag = {0x7265707269657665, 2};
  static constexpr const char* kExpected = "a Pidfd";

  static Napi::Function define(Napi::Env env);
  explicit PidfdObject(const Napi::CallbackInfo& info);

  /** The process; null, with `ERR_REPRIEVE_CLOSED` pending, when it is closed. */
  const reprieve::Pidfd* use(Napi::Env env) const;

 private:
  Napi::Value pid(const Napi::CallbackInfo& info);
  Napi::Value exited(const Napi::CallbackInfo& info);
  Napi::Value signal(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  reprieve::Pidfd process_;
};
