#pragma once

#include <napi.h>

#include "core/control_file.h"

/** `ControlFile` of src/native.ts; made by Directory.openFile only. */
class ControlFileObject : public Napi::ObjectWrap<ControlFileObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit ControlFileObject(const Napi::CallbackInfo& info);

 private:
  bool usable(Napi::Env env) const;
  Napi::Value readText(const Napi::CallbackInfo& info);
  Napi::Value readNumber(const Napi::CallbackInfo& info);
  void readFields(const Napi::CallbackInfo& info);
  void write(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  reprieve::ControlFile file_;
};
