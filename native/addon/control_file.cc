#include "control_file.h"

#include <array>

#include "instance.h"
#include "support.h"

namespace {

/** The wanted keys, copied to the stack: reading fields allocates nothing outside V8. */
class Keys {
 public:
  bool take(Napi::Env env, const Napi::Array& keys) {
    count_ = keys.Length();
    if (count_ > views_.size()) return false;
    size_t used = 0;
    for (uint32_t i = 0; i < count_; i++) {
      const Napi::HandleScope scope(env);
      size_t length = 0;
      // The last place is the terminating null's, so a key that fills the rest may have been cut off.
      const size_t room = text_.size() - used;
      if (napi_get_value_string_utf8(env, keys.Get(i), text_.data() + used, room, &length) != napi_ok ||
          length + 1 >= room) {
        return false;
      }
      views_[i] = {text_.data() + used, length};
      used += length;
    }
    return true;
  }
  std::span<const std::string_view> views() const { return {views_.data(), count_}; }

 private:
  std::array<char, 2048> text_;
  std::array<std::string_view, 64> views_;
  size_t count_ = 0;
};

}  // namespace

Napi::Function ControlFileObject::define(Napi::Env env) {
  using Self = ControlFileObject;
  return DefineClass(env, "ControlFile",
                     {
                         InstanceMethod<&Self::readText>("readText"),
                         InstanceMethod<&Self::readNumber>("readNumber"),
                         InstanceMethod<&Self::readFields>("readFields"),
                         InstanceMethod<&Self::write>("write"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

ControlFileObject::ControlFileObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  auto& made = Instance::of(info.Env()).newControlFile;
  if (!made) {
    Napi::TypeError::New(info.Env(), "A ControlFile is made by Directory.openFile").ThrowAsJavaScriptException();
    return;
  }
  file_ = std::move(*made);
  made.reset();
}

bool ControlFileObject::usable(Napi::Env env) const {
  if (file_.closed()) throwClosed(env, "control file");
  return !file_.closed();
}

Napi::Value ControlFileObject::readText(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!usable(env)) return env.Undefined();
  reprieve::ReadBuffer buffer;
  auto text = file_.read(buffer);
  if (text) return Napi::String::New(env, text->data(), text->size());
  throwSystemError(env, text.error());
  return env.Undefined();
}

Napi::Value ControlFileObject::readNumber(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return usable(env) ? toValue(env, file_.readNumber()) : env.Undefined();
}

void ControlFileObject::readFields(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!usable(env)) return;
  Keys keys;
  if (!info[0].IsArray() || !keys.take(env, info[0].As<Napi::Array>())) {
    if (env.IsExceptionPending()) return;
    return throwArgumentError(env, "keys", "an array of at most 64 strings, together shorter than 2048 bytes");
  }
  const auto out = arrayArgument(info, 1, "out", napi_float64_array, "a Float64Array");
  if (!out) return;
  auto values = out->As<Napi::Float64Array>();
  if (values.ElementLength() < keys.views().size()) {
    return throwArgumentError(env, "out", "a Float64Array with room for every key");
  }
  if (auto read = file_.readFields(keys.views(), {values.Data(), keys.views().size()}); !read) {
    throwSystemError(env, read.error());
  }
}

void ControlFileObject::write(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!usable(env)) return;
  const auto text = stringArgument(info, 0, "text");
  if (!text) return;
  if (auto written = file_.write(*text); !written) throwSystemError(env, written.error());
}

void ControlFileObject::close(const Napi::CallbackInfo&) { file_.close(); }
