#include "pidfd.h"

#include <csignal>
#include <limits>

#include "support.h"

Napi::Function PidfdObject::define(Napi::Env env) {
  using Self = PidfdObject;
  return DefineClass(env, "Pidfd",
                     {
                         InstanceAccessor<&Self::pid>("pid"),
                         InstanceMethod<&Self::exited>("exited"),
                         InstanceMethod<&Self::signal>("signal"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

PidfdObject::PidfdObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  napi_type_tag_object(env, info.This(), &kTag);
  const auto pid = integerArgument(info, 0, "pid", 1, std::numeric_limits<pid_t>::max());
  if (!pid) return;
  auto opened = reprieve::Pidfd::open(static_cast<pid_t>(*pid));
  if (!opened) {
    throwSystemError(env, opened.error());
    return;
  }
  process_ = std::move(*opened);
}

const reprieve::Pidfd* PidfdObject::use(Napi::Env env) const {
  if (!process_.closed()) return &process_;
  throwClosed(env, "pidfd");
  return nullptr;
}

Napi::Value PidfdObject::pid(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), process_.pid()); }

Napi::Value PidfdObject::exited(const Napi::CallbackInfo& info) {
  const auto* process = use(info.Env());
  return process != nullptr ? Napi::Boolean::New(info.Env(), process->exited()) : info.Env().Undefined();
}

Napi::Value PidfdObject::signal(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* process = use(env);
  if (process == nullptr) return env.Undefined();
  const auto number = integerArgument(info, 0, "signal", 0, SIGRTMAX);
  return number ? toValue(env, process->signal(static_cast<int>(*number))) : env.Undefined();
}

void PidfdObject::close(const Napi::CallbackInfo&) { process_.close(); }
