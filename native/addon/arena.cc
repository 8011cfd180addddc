#include "arena.h"

#include "support.h"

Napi::Function ArenaObject::define(Napi::Env env) {
  using Self = ArenaObject;
  return DefineClass(env, "Arena",
                     {
                         InstanceAccessor<&Self::buffer>("buffer"),
                         InstanceMethod<&Self::residentBytes>("residentBytes"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

ArenaObject::ArenaObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  // 64 GiB: far above any sensible arena, far below what V8 refuses by ending the process.
  const auto bytes = integerArgument(info, 0, "bytes", 1, int64_t{1} << 36);
  if (!bytes) return;
  auto mapped = reprieve::Arena::map(static_cast<size_t>(*bytes));
  if (!mapped) {
    throwSystemError(env, mapped.error());
    return;
  }
  arena_ = std::make_shared<reprieve::Arena>(std::move(*mapped));
  auto owner = std::make_unique<std::shared_ptr<reprieve::Arena>>(arena_);
  const auto drop = [](Napi::Env, void*, std::shared_ptr<reprieve::Arena>* shared) { delete shared; };
  const auto made = Napi::ArrayBuffer::New(env, arena_->data(), static_cast<size_t>(*bytes), drop, owner.release());
  if (!env.IsExceptionPending()) buffer_ = Napi::Persistent(made);
}

Napi::Value ArenaObject::buffer(const Napi::CallbackInfo&) { return buffer_.Value(); }

Napi::Value ArenaObject::residentBytes(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (arena_ != nullptr) return toValue(env, arena_->residentBytes());
  throwClosed(env, "arena");
  return env.Undefined();
}

void ArenaObject::close(const Napi::CallbackInfo& info) {
  if (arena_ == nullptr) return;
  // Detached first: no view may be left that points to memory which is gone.
  if (napi_detach_arraybuffer(info.Env(), buffer_.Value()) != napi_ok) {
    Napi::Error::New(info.Env(), "The arena's buffer cannot be detached").ThrowAsJavaScriptException();
    return;
  }
  arena_->unmap();
  arena_.reset();
}
