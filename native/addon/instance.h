#pragma once

#include <napi.h>

#include <optional>

#include "core/control_file.h"
#include "core/directory.h"
#include "core/process.h"

/** What belongs to one environment (the main thread or a worker). */
struct Instance {
  Napi::FunctionReference directory;
  Napi::FunctionReference controlFile;
  // Handed to the constructor that is called next: script has no way to forge it.
  std::optional<reprieve::Directory> newDirectory;
  std::optional<reprieve::ControlFile> newControlFile;
  reprieve::Scheduling scheduling;
  reprieve::TextLock text;

  static Instance& of(Napi::Env env) { return *env.GetInstanceData<Instance>(); }
};
