#include "process.h"

#include "core/process.h"
#include "instance.h"
#include "support.h"

namespace {

Napi::Value nowUs(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), reprieve::nowUs()); }

void readThreadUsage(const Napi::CallbackInfo& info) {
  const auto out = arrayArgument(info, 0, "out", napi_float64_array, "a Float64Array");
  if (!out) return;
  if (out->ElementLength() < 4) return throwArgumentError(info.Env(), "out", "a Float64Array of at least 4 elements");
  auto values = out->As<Napi::Float64Array>();
  const auto [minor, major, voluntary, involuntary] = reprieve::readThreadUsage();
  values[0] = minor;
  values[1] = major;
  values[2] = voluntary;
  values[3] = involuntary;
}

Napi::Value populate(const Napi::CallbackInfo& info) {
  auto bytes = reprieve::populate();
  if (bytes) return Napi::Number::New(info.Env(), static_cast<double>(*bytes));
  throwSystemError(info.Env(), bytes.error());
  return info.Env().Undefined();
}

void padMalloc(const Napi::CallbackInfo&) { reprieve::padMalloc(); }

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
  exports.Set("readThreadUsage", Napi::Function::New<readThreadUsage>(env, "readThreadUsage"));
  exports.Set("padMalloc", Napi::Function::New<padMalloc>(env, "padMalloc"));
  exports.Set("populate", Napi::Function::New<populate>(env, "populate"));
  exports.Set("raiseScheduling", Napi::Function::New<raiseScheduling>(env, "raiseScheduling"));
  exports.Set("restoreScheduling", Napi::Function::New<restoreScheduling>(env, "restoreScheduling"));
  exports.Set("lockText", Napi::Function::New<lockText>(env, "lockText"));
  exports.Set("unlockText", Napi::Function::New<unlockText>(env, "unlockText"));
  exports.Set("probeRelease", Napi::Function::New<probeRelease>(env, "probeRelease"));
}
