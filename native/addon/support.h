#pragma once

#include <napi.h>

#include <optional>
#include <string>

#include "core/result.h"

/** Throws the error of a system call in the manner of Node: errno, code, syscall, path. */
void throwSystemError(Napi::Env env, const reprieve::Error& error);
/** Throws a TypeError, `ERR_INVALID_ARG_TYPE`: "Expected `argument` to be …". */
void throwArgumentError(Napi::Env env, const char* argument, const char* expected);
/** Throws `ERR_REPRIEVE_CLOSED`. */
void throwClosed(Napi::Env env, const char* what);
/**
 * An exception that leaves a native callback is only a warning on Node 20; thrown from process.nextTick it is an
 * uncaughtException like any other. Nothing can be done where the environment is being terminated.
 */
void surfaceException(Napi::Env env);

// Arguments: nothing is returned once an exception is pending.

/** A string without null characters, which system calls would take for its end. */
std::optional<std::string> stringArgument(const Napi::CallbackInfo& info, size_t index, const char* name);
/** A whole number from `least` to `most`. */
std::optional<int64_t> integerArgument(const Napi::CallbackInfo& info, size_t index, const char* name, int64_t least,
                                       int64_t most);
/** A typed array of the given type; its `data` may be null when it is empty. */
std::optional<Napi::TypedArray> arrayArgument(const Napi::CallbackInfo& info, size_t index, const char* name,
                                              napi_typedarray_type type, const char* expected);

/** An object made by class `T` and by no other, even if its prototype was exchanged; else throws. */
template <typename T>
T* objectArgument(Napi::Env env, Napi::Value value, const char* name) {
  bool matches = false;
  if (value.IsObject()) napi_check_object_type_tag(env, value, &T::kTag, &matches);
  if (matches) return T::Unwrap(value.As<Napi::Object>());
  throwArgumentError(env, name, T::kExpected);
  return nullptr;
}

/** The value, or undefined with the exception pending. */
template <typename T>
Napi::Value toValue(Napi::Env env, reprieve::Result<T> result) {
  if (result) return Napi::Value::From(env, *result);
  throwSystemError(env, result.error());
  return env.Undefined();
}
