#include <napi.h>

#include "arena.h"
#include "channel.h"
#include "control_file.h"
#include "directory.h"
#include "event_set.h"
#include "instance.h"
#include "kept_pidfds.h"
#include "killer.h"
#include "pidfd.h"
#include "pressure.h"
#include "process.h"
#include "shared_words.h"

namespace {

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* instance = new Instance();
  env.SetInstanceData(instance);
  const Napi::Function directory = DirectoryObject::define(env);
  instance->directory = Napi::Persistent(directory);
  instance->controlFile = Napi::Persistent(ControlFileObject::define(env));
  exports.Set("Directory", directory);
  exports.Set("Pidfd", PidfdObject::define(env));
  exports.Set("EventSet", EventSetObject::define(env));
  exports.Set("PressureTrigger", PressureTriggerObject::define(env));
  exports.Set("Killer", KillerObject::define(env));
  exports.Set("KeptPidfds", KeptPidfdsObject::define(env));
  exports.Set("SharedWords", SharedWordsObject::define(env));
  exports.Set("Channel", ChannelObject::define(env));
  exports.Set("Arena", ArenaObject::define(env));
  defineProcess(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(reprieve, init)
