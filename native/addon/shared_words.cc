#include "shared_words.h"

#include "support.h"

Napi::Function SharedWordsObject::define(Napi::Env env) {
  using Self = SharedWordsObject;
  return DefineClass(env, "SharedWords",
                     {
                         InstanceAccessor<&Self::buffer>("buffer"),
                         InstanceAccessor<&Self::descriptor>("descriptor"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

SharedWordsObject::SharedWordsObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  napi_type_tag_object(env, info.This(), &kTag);
  auto made = reprieve::SharedWords::create();
  if (!made) {
    throwSystemError(env, made.error());
    return;
  }
  words_ = std::move(*made);
  auto owner = std::make_unique<std::shared_ptr<reprieve::SharedWords>>(words_);
  const auto drop = [](Napi::Env, void*, std::shared_ptr<reprieve::SharedWords>* shared) { delete shared; };
  const auto view = Napi::ArrayBuffer::New(env, words_->data(), reprieve::SharedWords::kBytes, drop, owner.release());
  if (!env.IsExceptionPending()) buffer_ = Napi::Persistent(view);
}

Napi::Value SharedWordsObject::buffer(const Napi::CallbackInfo&) { return buffer_.Value(); }

Napi::Value SharedWordsObject::descriptor(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), words_->descriptor());
}

void SharedWordsObject::close(const Napi::CallbackInfo&) { words_->close(); }
