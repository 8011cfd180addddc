#include "directory.h"

#include <fcntl.h>

#include "control_file.h"
#include "instance.h"
#include "support.h"

Napi::Function DirectoryObject::define(Napi::Env env) {
  using Self = DirectoryObject;
  return DefineClass(env, "Directory",
                     {
                         InstanceAccessor<&Self::inode>("inode"),
                         InstanceAccessor<&Self::uid>("uid"),
                         InstanceAccessor<&Self::fsType>("fsType"),
                         InstanceAccessor<&Self::descriptor>("descriptor"),
                         InstanceMethod<&Self::openBeneath>("openBeneath"),
                         InstanceMethod<&Self::subdirectories>("subdirectories"),
                         InstanceMethod<&Self::openFile>("openFile"),
                         InstanceMethod<&Self::readFile>("readFile"),
                         InstanceMethod<&Self::writeFile>("writeFile"),
                         InstanceMethod<&Self::makeDirectory>("makeDirectory"),
                         InstanceMethod<&Self::removeDirectory>("removeDirectory"),
                         InstanceMethod<&Self::getAttribute>("getAttribute"),
                         InstanceMethod<&Self::claim>("claim"),
                         InstanceMethod<&Self::unclaim>("unclaim"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

DirectoryObject::DirectoryObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  napi_type_tag_object(env, info.This(), &kTag);
  if (auto& made = Instance::of(env).newDirectory) {
    directory_ = std::move(*made);
    made.reset();
    return;
  }
  const auto path = stringArgument(info, 0, "path");
  if (!path) return;
  auto opened = reprieve::Directory::open(*path);
  if (!opened) {
    throwSystemError(env, opened.error());
    return;
  }
  directory_ = std::move(*opened);
}

const reprieve::Directory* DirectoryObject::use(Napi::Env env) const {
  if (!directory_.closed()) return &directory_;
  throwClosed(env, "directory");
  return nullptr;
}

Napi::Value DirectoryObject::inode(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), static_cast<double>(directory_.inode()));
}

Napi::Value DirectoryObject::uid(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), directory_.uid());
}

Napi::Value DirectoryObject::fsType(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), static_cast<double>(directory_.fsType()));
}

Napi::Value DirectoryObject::descriptor(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), directory_.descriptor());
}

Napi::Value DirectoryObject::openBeneath(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return env.Undefined();
  const auto relative = stringArgument(info, 0, "relative");
  if (!relative) return env.Undefined();
  auto opened = directory->openBeneath(*relative);
  if (!opened) {
    throwSystemError(env, opened.error());
    return env.Undefined();
  }
  Instance& instance = Instance::of(env);
  instance.newDirectory = std::move(*opened);
  const Napi::Value object = instance.directory.New({});
  // Still there if the constructor was not reached (the stack is full).
  instance.newDirectory.reset();
  return object;
}

Napi::Value DirectoryObject::subdirectories(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return env.Undefined();
  auto names = directory->subdirectories();
  if (!names) {
    throwSystemError(env, names.error());
    return env.Undefined();
  }
  const Napi::Array array = Napi::Array::New(env, names->size());
  for (uint32_t i = 0; i < names->size(); i++) array.Set(i, (*names)[i]);
  return array;
}

Napi::Value DirectoryObject::openFile(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return env.Undefined();
  const auto name = stringArgument(info, 0, "name");
  if (!name) return env.Undefined();
  const std::string mode = info[1].IsString() ? info[1].As<Napi::String>().Utf8Value() : "";
  if (mode != "read" && mode != "write" && mode != "readwrite") {
    throwArgumentError(env, "mode", "'read', 'write' or 'readwrite'");
    return env.Undefined();
  }
  auto file =
      reprieve::ControlFile::open(*directory, *name, mode == "read" ? O_RDONLY : (mode == "write" ? O_WRONLY : O_RDWR));
  if (!file) {
    throwSystemError(env, file.error());
    return env.Undefined();
  }
  Instance& instance = Instance::of(env);
  instance.newControlFile = std::move(*file);
  const Napi::Value object = instance.controlFile.New({});
  // Still there if the constructor was not reached (the stack is full).
  instance.newControlFile.reset();
  return object;
}

Napi::Value DirectoryObject::readFile(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return env.Undefined();
  const auto name = stringArgument(info, 0, "name");
  return name ? toValue(env, directory->readFile(*name)) : env.Undefined();
}

void DirectoryObject::writeFile(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return;
  const auto name = stringArgument(info, 0, "name");
  if (!name) return;
  const auto text = stringArgument(info, 1, "text");
  if (!text) return;
  if (auto written = directory->writeFile(*name, *text); !written) throwSystemError(env, written.error());
}

void DirectoryObject::makeDirectory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return;
  const auto name = stringArgument(info, 0, "name");
  if (!name) return;
  if (auto made = directory->makeDirectory(*name); !made) throwSystemError(env, made.error());
}

void DirectoryObject::removeDirectory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return;
  const auto name = stringArgument(info, 0, "name");
  if (!name) return;
  if (auto removed = directory->removeDirectory(*name); !removed) throwSystemError(env, removed.error());
}

Napi::Value DirectoryObject::getAttribute(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return env.Undefined();
  const auto name = stringArgument(info, 0, "name");
  if (!name) return env.Undefined();
  auto value = directory->getAttribute(*name);
  if (!value) {
    throwSystemError(env, value.error());
    return env.Undefined();
  }
  return *value ? Napi::String::New(env, **value) : env.Null();
}

Napi::Value DirectoryObject::claim(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto* directory = use(env);
  if (directory == nullptr) return env.Undefined();
  auto claimed = directory->claim();
  if (claimed) return Napi::Boolean::New(env, *claimed);
  throwSystemError(env, claimed.error());
  return env.Undefined();
}

void DirectoryObject::unclaim(const Napi::CallbackInfo& info) {
  const auto* directory = use(info.Env());
  if (directory != nullptr) directory->unclaim();
}

void DirectoryObject::close(const Napi::CallbackInfo&) { directory_.close(); }

const reprieve::Directory* directoryArgument(Napi::Env env, Napi::Value value, const char* name) {
  const auto* object = objectArgument<DirectoryObject>(env, value, name);
  return object == nullptr ? nullptr : object->use(env);
}
