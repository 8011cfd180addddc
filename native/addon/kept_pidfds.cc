#include "kept_pidfds.h"

#include <vector>

#include "support.h"

Napi::Function KeptPidfdsObject::define(Napi::Env env) {
  using Self = KeptPidfdsObject;
  return DefineClass(env, "KeptPidfds", {InstanceMethod<&Self::keep>("keep"), InstanceMethod<&Self::close>("close")});
}

KeptPidfdsObject::KeptPidfdsObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  napi_type_tag_object(info.Env(), info.This(), &kTag);
}

Napi::Value KeptPidfdsObject::keep(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto argument = arrayArgument(info, 0, "pids", napi_int32_array, "an Int32Array");
  if (!argument) return env.Undefined();
  const auto array = argument->As<Napi::Int32Array>();
  const std::span<const pid_t> pids(array.Data(), array.ElementLength());
  return Napi::Number::New(env, static_cast<double>(kept_->keep(pids)));
}

void KeptPidfdsObject::close(const Napi::CallbackInfo&) { kept_->close(); }
