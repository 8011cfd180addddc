#pragma once

#include <napi.h>

#include <memory>

#include "core/arena.h"

/** `Arena` of src/native.ts. */
class ArenaObject : public Napi::ObjectWrap<ArenaObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit ArenaObject(const Napi::CallbackInfo& info);

 private:
  Napi::Value buffer(const Napi::CallbackInfo& info);
  Napi::Value residentBytes(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  // Shared with the buffer: script may keep that longer than this object.
  std::shared_ptr<reprieve::Arena> arena_;
  Napi::Reference<Napi::ArrayBuffer> buffer_;
};
