#include "channel.h"

#include <array>

#include "directory.h"
#include "event_set.h"
#include "pidfd.h"
#include "support.h"

namespace {

/** The descriptor of a Directory or a Pidfd; -1 with an exception pending. */
int descriptorOf(Napi::Env env, Napi::Value value) {
  bool isDirectory = false;
  if (value.IsObject()) napi_check_object_type_tag(env, value, &DirectoryObject::kTag, &isDirectory);
  if (isDirectory) {
    const auto* directory = DirectoryObject::Unwrap(value.As<Napi::Object>())->use(env);
    return directory != nullptr ? directory->descriptor() : -1;
  }
  const auto* object = objectArgument<PidfdObject>(env, value, "descriptors[]");
  if (object == nullptr) return -1;
  const auto* process = object->use(env);
  return process != nullptr ? process->descriptor() : -1;
}

}  // namespace

Napi::Function ChannelObject::define(Napi::Env env) {
  using Self = ChannelObject;
  return DefineClass(env, "Channel",
                     {
                         InstanceAccessor<&Self::token>("token"),
                         InstanceAccessor<&Self::peer>("peer"),
                         InstanceMethod<&Self::closePeer>("closePeer"),
                         InstanceMethod<&Self::send>("send"),
                         InstanceMethod<&Self::receive>("receive"),
                         InstanceMethod<&Self::close>("close"),
                     });
}

ChannelObject::ChannelObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  const Napi::Env env = info.Env();
  const auto* object = objectArgument<EventSetObject>(env, info[0], "events");
  if (object == nullptr) return;
  const auto* events = object->use(env);
  if (events == nullptr) return;
  auto pair = reprieve::Channel::make();
  if (!pair) {
    throwSystemError(env, pair.error());
    return;
  }
  const int32_t token = (*events)->takeToken();
  if (auto added = (*events)->watchReadable(pair->first.descriptor(), token); !added) {
    throwSystemError(env, added.error());
    return;
  }
  events_ = *events;
  token_ = token;
  channel_ = std::move(pair->first);
  peer_ = std::move(pair->second);
}

void ChannelObject::shut() {
  if (channel_.closed()) return;
  events_->forgetReadable(channel_.descriptor());
  channel_.close();
  peer_.close();
}

Napi::Value ChannelObject::token(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), token_); }

Napi::Value ChannelObject::peer(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), peer_.get()); }

void ChannelObject::closePeer(const Napi::CallbackInfo&) { peer_.close(); }

void ChannelObject::send(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (channel_.closed()) {
    throwClosed(env, "channel");
    return;
  }
  const auto message = arrayArgument(info, 0, "message", napi_uint8_array, "a Uint8Array");
  if (!message) return;
  if (!info[1].IsArray() || info[1].As<Napi::Array>().Length() > reprieve::Channel::kMostDescriptors) {
    throwArgumentError(env, "descriptors", "an array of at most 16 Directory or Pidfd objects");
    return;
  }
  const auto list = info[1].As<Napi::Array>();
  std::array<int, reprieve::Channel::kMostDescriptors> descriptors{};
  for (uint32_t i = 0; i < list.Length(); i++) {
    descriptors[i] = descriptorOf(env, list.Get(i));
    if (descriptors[i] < 0) return;
  }
  const auto bytes = message->As<Napi::Uint8Array>();
  auto sent = channel_.send({bytes.Data(), bytes.ByteLength()}, {descriptors.data(), list.Length()});
  if (!sent) throwSystemError(env, sent.error());
}

Napi::Value ChannelObject::receive(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (channel_.closed()) {
    throwClosed(env, "channel");
    return env.Undefined();
  }
  std::array<uint8_t, 256> buffer;
  auto length = channel_.receive(buffer);
  if (!length) {
    throwSystemError(env, length.error());
    return env.Undefined();
  }
  if (!*length) return env.Null();
  return Napi::Buffer<uint8_t>::Copy(env, buffer.data(), **length);
}

void ChannelObject::close(const Napi::CallbackInfo&) { shut(); }
