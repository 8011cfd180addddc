#pragma once

#include <napi.h>

/** The functions of src/native.ts that belong to no object. */
void defineProcess(Napi::Env env, Napi::Object exports);
