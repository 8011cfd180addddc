#pragma once

#include <napi.h>

#include <optional>
#include <vector>

#include "core/killer.h"

/** `Killer` of src/native.ts. */
class KillerObject : public Napi::ObjectWrap<KillerObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit KillerObject(const Napi::CallbackInfo& info);

 private:
  bool usable(Napi::Env env) const;
  Napi::Value token(const Napi::CallbackInfo& info);
  Napi::Value pids(const Napi::CallbackInfo& info);
  Napi::Value unreachable(const Napi::CallbackInfo& info);
  Napi::Value round(const Napi::CallbackInfo& info);
  Napi::Value signal(const Napi::CallbackInfo& info);
  Napi::Value alive(const Napi::CallbackInfo& info);
  Napi::Value release(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  std::optional<reprieve::Killer> killer_;
  std::vector<const reprieve::Directory*> directories_;
};
