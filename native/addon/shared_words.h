#pragma once

#include <napi.h>

#include <memory>

#include "core/shared_words.h"

/** `SharedWords` of src/native.ts. */
class SharedWordsObject : public Napi::ObjectWrap<SharedWordsObject> {
 public:
  static constexpr napi_type_tag kTag = {0x7265707269657665, 4};
  static constexpr const char* kExpected = "SharedWords";

  static Napi::Function define(Napi::Env env);
  explicit SharedWordsObject(const Napi::CallbackInfo& info);

  std::shared_ptr<const reprieve::SharedWords> words() const { return words_; }

 private:
  Napi::Value buffer(const Napi::CallbackInfo& info);
  Napi::Value descriptor(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  std::shared_ptr<reprieve::SharedWords> words_;
  Napi::Reference<Napi::ArrayBuffer> buffer_;
};
