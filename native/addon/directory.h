#pragma once

#include <napi.h>

#include "core/directory.h"

/** `Directory` of src/native.ts. */
class DirectoryObject : public Napi::ObjectWrap<DirectoryObject> {
 public:
  static constexpr napi_type_tag kTag = {0x7265707269657665, 1};
  static constexpr const char* kExpected = "a Directory";

  static Napi::Function define(Napi::Env env);
  explicit DirectoryObject(const Napi::CallbackInfo& info);

  /** The directory; null, with `ERR_REPRIEVE_CLOSED` pending, when it is closed. */
  const reprieve::Directory* use(Napi::Env env) const;

 private:
  Napi::Value inode(const Napi::CallbackInfo& info);
  Napi::Value uid(const Napi::CallbackInfo& info);
  Napi::Value fsType(const Napi::CallbackInfo& info);
  Napi::Value descriptor(const Napi::CallbackInfo& info);
  Napi::Value openBeneath(const Napi::CallbackInfo& info);
  Napi::Value subdirectories(const Napi::CallbackInfo& info);
  Napi::Value openFile(const Napi::CallbackInfo& info);
  Napi::Value readFile(const Napi::CallbackInfo& info);
  void writeFile(const Napi::CallbackInfo& info);
  void makeDirectory(const Napi::CallbackInfo& info);
  void removeDirectory(const Napi::CallbackInfo& info);
  Napi::Value getAttribute(const Napi::CallbackInfo& info);
  Napi::Value claim(const Napi::CallbackInfo& info);
  void unclaim(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);

  reprieve::Directory directory_;
};

/** What a Directory that a caller gave stands for; null with an exception pending when it is none, or closed. */
const reprieve::Directory* directoryArgument(Napi::Env env, Napi::Value value, const char* name = "directory");
