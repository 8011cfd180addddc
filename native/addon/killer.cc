#include "killer.h"

#include "directory.h"
#include "event_set.h"
#include "kept_pidfds.h"
#include "pidfd.h"
#include "shared_words.h"
#include "support.h"

Napi::Function KillerObject::define(Napi::Env env) {
  using Self = KillerObject;
  return DefineClass(env, "Killer",
                     {
                         InstanceAccessor<&Self::token>("token"),
                         InstanceAccessor<&Self::pids>("pids"),
                         InstanceAccessor<&Self::unreachable>("unreachable"),
                         InstanceMethod<&Self::round>("round"),
                         InstanceMethod<&Self::signal>("signal"),
                         InstanceMethod<&Self::alive>("alive"),
                         InstanceMethod<&Self::release>("release"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

KillerObject::KillerObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const auto* events = objectArgument<EventSetObject>(info.Env(), info[0], "events");
  if (events == nullptr) return;
  const auto* set = events->use(info.Env());
  const bool dry = info[1].IsBoolean() && info[1].As<Napi::Boolean>().Value();
  if (set == nullptr) return;
  std::shared_ptr<const reprieve::SharedWords> words;
  if (!info[2].IsUndefined()) {
    const auto* object = objectArgument<SharedWordsObject>(info.Env(), info[2], "words");
    if (object == nullptr) return;
    words = object->words();
  }
  std::shared_ptr<const reprieve::KeptPidfds> kept;
  if (!info[3].IsUndefined()) {
    const auto* object = objectArgument<KeptPidfdsObject>(info.Env(), info[3], "kept");
    if (object == nullptr) return;
    kept = object->kept();
  }
  killer_.emplace(*set, dry ? 0 : SIGKILL, std::move(words), std::move(kept));
}

bool KillerObject::usable(Napi::Env env) const {
  if (killer_->closed()) throwClosed(env, "killer");
  return !killer_->closed();
}

Napi::Value KillerObject::token(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), killer_->token());
}

Napi::Value KillerObject::pids(const Napi::CallbackInfo& info) {
  const auto& pids = killer_->pids();
  const Napi::Array array = Napi::Array::New(info.Env(), pids.size());
  for (uint32_t i = 0; i < pids.size(); i++) array.Set(i, pids[i]);
  return array;
}

Napi::Value KillerObject::unreachable(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), killer_->unreachable());
}

Napi::Value KillerObject::round(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!usable(env)) return env.Undefined();
  if (!info[0].IsArray()) {
    throwArgumentError(env, "directories", "an array of Directory objects");
    return env.Undefined();
  }
  const auto list = info[0].As<Napi::Array>();
  directories_.clear();
  for (uint32_t i = 0; i < list.Length(); i++) {
    const auto* directory = directoryArgument(env, list.Get(i), "directories[]");
    if (directory == nullptr) return env.Undefined();
    directories_.push_back(directory);
  }
  const auto file = stringArgument(info, 1, "file");
  return file ? toValue(env, killer_->round(directories_, *file)) : env.Undefined();
}

Napi::Value KillerObject::signal(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!usable(env)) return env.Undefined();
  const auto* object = objectArgument<PidfdObject>(env, info[0], "pidfd");
  if (object == nullptr) return env.Undefined();
  const auto* process = object->use(env);
  return process != nullptr ? toValue(env, killer_->signal(*process)) : env.Undefined();
}

Napi::Value KillerObject::alive(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return usable(env) ? Napi::Number::New(env, killer_->alive()) : env.Undefined();
}

Napi::Value KillerObject::release(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!usable(env)) return env.Undefined();
  const auto [reaped, refused] = killer_->release();
  const Napi::Array result = Napi::Array::New(env, 2);
  result.Set(0U, reaped);
  result.Set(1U, refused);
  return result;
}

void KillerObject::close(const Napi::CallbackInfo&) { killer_->close(); }
