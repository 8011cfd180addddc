#include "support.h"

#include <uv.h>

#include <array>
#include <cmath>
#include <system_error>

namespace {

void throwArgument(const Napi::CallbackInfo& info) { napi_throw(info.Env(), info[0]); }

}  // namespace

void throwSystemError(Napi::Env env, const reprieve::Error& error) {
  std::array<char, 64> code;
  uv_err_name_r(-error.number, code.data(), code.size());
  std::string message = error.syscall;
  if (!error.path.empty()) message += " '" + error.path + '\'';
  message += ": " + std::generic_category().message(error.number) + " (" + code.data() + ')';
  const Napi::Error thrown = Napi::Error::New(env, message);
  thrown.Set("errno", Napi::Number::New(env, error.number));
  thrown.Set("code", Napi::String::New(env, code.data()));
  thrown.Set("syscall", Napi::String::New(env, error.syscall));
  if (!error.path.empty()) thrown.Set("path", Napi::String::New(env, error.path));
  thrown.ThrowAsJavaScriptException();
}

void throwArgumentError(Napi::Env env, const char* argument, const char* expected) {
  const Napi::TypeError thrown =
      Napi::TypeError::New(env, std::string("Expected `") + argument + "` to be " + expected);
  thrown.Set("code", Napi::String::New(env, "ERR_INVALID_ARG_TYPE"));
  thrown.ThrowAsJavaScriptException();
}

void throwClosed(Napi::Env env, const char* what) {
  const Napi::Error thrown = Napi::Error::New(env, std::string("The ") + what + " is closed");
  thrown.Set("code", Napi::String::New(env, "ERR_REPRIEVE_CLOSED"));
  thrown.ThrowAsJavaScriptException();
}

void surfaceException(Napi::Env env) {
  napi_value error = nullptr;
  if (napi_get_and_clear_last_exception(env, &error) != napi_ok) return;
  const Napi::Value process = env.Global().Get("process");
  if (!process.IsObject()) return;
  const Napi::Value nextTick = process.As<Napi::Object>().Get("nextTick");
  if (!nextTick.IsFunction()) return;
  nextTick.As<Napi::Function>().Call(process, {Napi::Function::New<throwArgument>(env, "rethrow"), error});
}

std::optional<std::string> stringArgument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  if (info[index].IsString()) {
    std::string text = info[index].As<Napi::String>().Utf8Value();
    if (text.find('\0') == std::string::npos) return text;
  }
  throwArgumentError(info.Env(), name, "a string without null characters");
  return std::nullopt;
}

std::optional<int64_t> integerArgument(const Napi::CallbackInfo& info, size_t index, const char* name, int64_t least,
                                       int64_t most) {
  if (info[index].IsNumber()) {
    const double number = info[index].As<Napi::Number>().DoubleValue();
    if (number == std::trunc(number) && number >= static_cast<double>(least) && number <= static_cast<double>(most)) {
      return static_cast<int64_t>(number);
    }
  }
  const std::string expected = "a whole number from " + std::to_string(least) + " to " + std::to_string(most);
  throwArgumentError(info.Env(), name, expected.c_str());
  return std::nullopt;
}

std::optional<Napi::TypedArray> arrayArgument(const Napi::CallbackInfo& info, size_t index, const char* name,
                                              napi_typedarray_type type, const char* expected) {
  if (info[index].IsTypedArray()) {
    const auto array = info[index].As<Napi::TypedArray>();
    if (array.TypedArrayType() == type) return array;
  }
  throwArgumentError(info.Env(), name, expected);
  return std::nullopt;
}
