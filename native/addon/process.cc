#include "process.h"

#include "core/process.h"
#include "instance.h"
#include "support.h"

namespace {

Napi::Value nowUs(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), reprieve::nowUs()); }

void readFaults(const Napi::CallbackInfo& info) {
  const auto out = arrayArgument(info, 0, "out", napi_float64_array, "a Float64Array");
  if (!out) return;
  if (out->ElementLength() < 2) return throwArgumentError(info.Env(), "out", "a Float64Array of at least 2 elements");
  auto values = out->As<Napi::Float64Array>();
  const auto [minor, major] = reprieve::readFaults();
  values[0] = minor;
  values[1] = major;
}

void raiseScheduling(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::string to = info[0].IsString() ? info[0].As<Napi::String>().Utf8Value() : "";
  if (to != "realtime" && to != "nice") return throwArgumentError(env, "to", "'realtime' or 'nice'");
  const auto raise = to == "realtime" ? reprieve::Raise::kRealtime : reprieve::Raise::kNice;
  if (auto raised = Instance::of(env).scheduling.raise(raise); !raised) throwSystemError(env, raised.error());
}

void restoreScheduling(const Napi::CallbackInfo& info) {
  auto restored = Instance::of(info.Env()).scheduling.restore();
  if (!restored) throwSystemError(info.Env(), restored.error());
}

Napi::Value lockText(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  auto outcome = Instance::of(env).text.lock();
  if (!outcome) {
    throwSystemError(env, outcome.error());
    return env.Undefined();
  }
  const Napi::Object object = Napi::Object::New(env);
  object.Set("bytes", static_cast<double>(outcome->bytes));
  object.Set("failed", outcome->failed);
  return object;
}

void unlockText(const Napi::CallbackInfo& info) { Instance::of(info.Env()).text.unlock(); }

Napi::Value probeRelease(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), reprieve::probeRelease());
}

}  // namespace

void defineProcess(Napi::Env env, Napi::Object exports) {
  exports.Set("nowUs", Napi::Function::New<nowUs>(env, "nowUs"));
  exports.Set("readFaults", Napi::Function::New<readFaults>(env, "readFaults"));
  exports.Set("raiseScheduling", Napi::Function::New<raiseScheduling>(env, "raiseScheduling"));
  exports.Set("restoreScheduling", Napi::Function::New<restoreScheduling>(env, "restoreScheduling"));
  exports.Set("lockText", Napi::Function::New<lockText>(env, "lockText"));
  exports.Set("unlockText", Napi::Function::New<unlockText>(env, "unlockText"));
  exports.Set("probeRelease", Napi::Function::New<probeRelease>(env, "probeRelease"));
}
