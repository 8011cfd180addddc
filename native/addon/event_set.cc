#include "event_set.h"

#include <algorithm>
#include <limits>

#include "core/process.h"
#include "directory.h"
#include "support.h"

Napi::Function EventSetObject::define(Napi::Env env) {
  using Self = EventSetObject;
  return DefineClass(env, "EventSet",
                     {
                         InstanceAccessor<&Self::size>("size"),
                         InstanceMethod<&Self::addCgroupEvent>("addCgroupEvent"),
                         InstanceMethod<&Self::watchFile>("watchFile"),
                         InstanceMethod<&Self::watchDirectory>("watchDirectory"),
                         InstanceMethod<&Self::readDirectoryEvents>("readDirectoryEvents"),
                         InstanceMethod<&Self::trigger>("trigger"),
                         InstanceMethod<&Self::remove>("remove"),
                         InstanceMethod<&Self::ref>("ref"),
                         InstanceMethod<&Self::unref>("unref"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

EventSetObject::EventSetObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  napi_type_tag_object(env, info.This(), &kTag);
  const auto ready = arrayArgument(info, 0, "ready", napi_int32_array, "an Int32Array");
  if (!ready) return;
  if (ready->ElementLength() == 0) {
    throwArgumentError(env, "ready", "an Int32Array that is not empty");
    return;
  }
  if (!info[1].IsFunction()) {
    throwArgumentError(env, "onReady", "a function");
    return;
  }
  auto set = reprieve::EventSet::create();
  if (!set) {
    throwSystemError(env, set.error());
    return;
  }

  poll_ = LoopPoll::start(env, (*set)->descriptor(), UV_READABLE, *this);
  if (poll_ == nullptr) return;
  set_ = std::move(*set);
  ready_ = Napi::Persistent(*ready);
  onReady_ = Napi::Persistent(info[1].As<Napi::Function>());
  context_ = std::make_unique<Napi::AsyncContext>(env, "reprieve.EventSet");
}

const std::shared_ptr<reprieve::EventSet>* EventSetObject::use(Napi::Env env) const {
  if (poll_ != nullptr) return &set_;
  throwClosed(env, "event set");
  return nullptr;
}

void EventSetObject::wake() {
  const double atUs = reprieve::nowUs();
  const Napi::Env env = Env();
  const Napi::HandleScope scope(env);
  // Asked for each time: whoever owns the array may have transferred its memory away.
  auto ready = ready_.Value().As<Napi::Int32Array>();
  const size_t count = set_->drain({ready.Data(), ready.ElementLength()});
  if (count == 0) return;
  // This handle keeps the object alive should onReady drop the last reference to it.
  const Napi::Object self = Value();
  const Napi::CallbackScope callbacks(env, *context_);
  onReady_.Call(self, {Napi::Number::New(env, static_cast<double>(count)), Napi::Number::New(env, atUs)});
  if (env.IsExceptionPending()) surfaceException(env);
}

void EventSetObject::shut() {
  if (poll_ == nullptr) return;
  // First out of the loop's own epoll set, then the descriptor may go.
  std::exchange(poll_, nullptr)->close();
  set_->close();
  onReady_.Reset();
  ready_.Reset();
}

Napi::Value EventSetObject::addCgroupEvent(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* set = use(env);
  if (set == nullptr) return env.Undefined();
  const auto* directory = directoryArgument(env, info[0]);
  if (directory == nullptr) return env.Undefined();
  const auto file = stringArgument(info, 1, "file");
  if (!file) return env.Undefined();
  const auto argument = stringArgument(info, 2, "argument");
  if (!argument) return env.Undefined();
  return toValue(env, (*set)->addCgroupEvent(*directory, *file, *argument));
}

Napi::Value EventSetObject::watchFile(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* set = use(env);
  if (set == nullptr) return env.Undefined();
  const auto* directory = directoryArgument(env, info[0]);
  if (directory == nullptr) return env.Undefined();
  const auto name = stringArgument(info, 1, "name");
  return name ? toValue(env, (*set)->watchFile(*directory, *name)) : env.Undefined();
}

Napi::Value EventSetObject::watchDirectory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* set = use(env);
  if (set == nullptr) return env.Undefined();
  const auto* directory = directoryArgument(env, info[0]);
  return directory != nullptr ? toValue(env, (*set)->watchDirectory(*directory)) : env.Undefined();
}

Napi::Value EventSetObject::readDirectoryEvents(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* set = use(env);
  if (set == nullptr) return env.Undefined();
  auto events = (*set)->readDirectoryEvents();
  if (!events) {
    throwSystemError(env, events.error());
    return env.Undefined();
  }
  const Napi::Array array = Napi::Array::New(env, events->size());
  uint32_t index = 0;
  for (const reprieve::DirectoryEvent& event : *events) {
    const Napi::HandleScope scope(env);
    const Napi::Object object = Napi::Object::New(env);
    object.Set("token", event.token);
    object.Set("name", event.name);
    object.Set("created", event.created);
    object.Set("removed", event.removed);
    object.Set("attributes", event.attributes);
    object.Set("overflow", event.overflow);
    array.Set(index++, object);
  }
  return array;
}

std::optional<int32_t> EventSetObject::tokenArgument(const Napi::CallbackInfo& info) {
  constexpr int64_t kLeast = std::numeric_limits<int32_t>::min();
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto token = integerArgument(info, 0, "token", kLeast, kMost);
  if (!token) return std::nullopt;
  return static_cast<int32_t>(*token);
}

void EventSetObject::trigger(const Napi::CallbackInfo& info) {
  const auto* set = use(info.Env());
  if (set == nullptr) return;
  if (const auto token = tokenArgument(info)) (*set)->trigger(*token);
}

void EventSetObject::remove(const Napi::CallbackInfo& info) {
  const auto* set = use(info.Env());
  if (set == nullptr) return;
  if (const auto token = tokenArgument(info)) (*set)->remove(*token);
}

Napi::Value EventSetObject::size(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), static_cast<double>(set_->size()));
}

void EventSetObject::ref(const Napi::CallbackInfo& info) {
  if (use(info.Env()) != nullptr) poll_->ref();
}

void EventSetObject::unref(const Napi::CallbackInfo& info) {
  if (use(info.Env()) != nullptr) poll_->unref();
}

void EventSetObject::close(const Napi::CallbackInfo&) { shut(); }
