#pragma once

#include <napi.h>

#include <memory>

#include "core/kept_pidfds.h"

/** `KeptPidfds` of src/native.ts. */
class KeptPidfdsObject : public Napi::ObjectWrap<KeptPidfdsObject> {
 public:
  static constexpr napi_type_tag kTag = {0x7265707269657665, 5};
  static constexpr const char* kExpected = "KeptPidfds";

  static Napi::Function define(Napi::Env env);
  explicit KeptPidfdsObject(const Napi::CallbackInfo& info);

  std::shared_ptr<const reprieve::KeptPidfds> kept() const { return kept_; }

 private:
  Napi::Value keep(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  std::shared_ptr<reprieve::KeptPidfds> kept_ = std::make_shared<reprieve::KeptPidfds>();
};
