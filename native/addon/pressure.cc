#include "pressure.h"

#include <poll.h>

#include <utility>

#include "core/pressure.h"
#include "core/process.h"
#include "directory.h"
#include "support.h"

Napi::Function PressureTriggerObject::define(Napi::Env env) {
  using Self = PressureTriggerObject;
  return DefineClass(env, "PressureTrigger",
                     {
                         InstanceMethod<&Self::ref>("ref"),
                         InstanceMethod<&Self::unref>("unref"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

PressureTriggerObject::PressureTriggerObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  const auto* directory = directoryArgument(env, info[0]);
  if (directory == nullptr) return;
  const auto name = stringArgument(info, 1, "name");
  if (!name) return;
  const auto trigger = stringArgument(info, 2, "trigger");
  if (!trigger) return;
  if (!info[3].IsFunction()) {
    throwArgumentError(env, "onEvent", "a function");
    return;
  }
  auto file = reprieve::openPressureTrigger(*directory, *name, *trigger);
  if (!file) {
    throwSystemError(env, file.error());
    return;
  }
  poll_ = LoopPoll::start(env, file->get(), UV_PRIORITIZED, *this);
  if (poll_ == nullptr) return;
  file_ = std::move(*file);
  onEvent_ = Napi::Persistent(info[3].As<Napi::Function>());
  context_ = std::make_unique<Napi::AsyncContext>(env, "reprieve.PressureTrigger");
}

void PressureTriggerObject::wake() {
  const double atUs = reprieve::nowUs();
  // libuv tells POLLPRI and POLLERR together as the former alone. The event itself is taken, so what is left is the
  // error, which would be there for ever: the cgroup is gone.
  pollfd entry{file_.get(), 0, 0};
  if (poll(&entry, 1, 0) > 0) {
    poll_->stop();
    return;
  }
  const Napi::Env env = Env();
  const Napi::HandleScope scope(env);
  // This handle keeps the object alive should onEvent drop the last reference to it.
  const Napi::Object self = Value();
  const Napi::CallbackScope callbacks(env, *context_);
  onEvent_.Call(self, {Napi::Number::New(env, atUs)});
  if (env.IsExceptionPending()) surfaceException(env);
}

void PressureTriggerObject::shut() {
  if (poll_ == nullptr) return;
  // First out of the loop's own epoll set, then the descriptor may go.
  std::exchange(poll_, nullptr)->close();
  file_.close();
  onEvent_.Reset();
}

bool PressureTriggerObject::use(Napi::Env env) const {
  if (poll_ == nullptr) throwClosed(env, "pressure trigger");
  return poll_ != nullptr;
}

void PressureTriggerObject::ref(const Napi::CallbackInfo& info) {
  if (use(info.Env())) poll_->ref();
}

void PressureTriggerObject::unref(const Napi::CallbackInfo& info) {
  if (use(info.Env())) poll_->unref();
}

void PressureTriggerObject::close(const Napi::CallbackInfo&) { shut(); }
