#pragma once

#include <napi.h>
#include <uv.h>

/** Who has a descriptor polled by the event loop of its environment. */
class LoopOwner {
 public:
  LoopOwner() = default;
  LoopOwner(const LoopOwner&) = delete;
  LoopOwner& operator=(const LoopOwner&) = delete;

  /** Called by the loop when the descriptor is ready. */
  virtual void wake() = 0;
  /** The environment ends: closes the poll, then the descriptor. */
  virtual void shut() = 0;

 protected:
  ~LoopOwner() = default;
};

/**
 * The loop's handle. It outlives its owner, because the loop gives it back only after uv_close; the cleanup hook keeps
 * the loop of a worker that ends turning until then.
 */
class LoopPoll {
 public:
  /** `events` as of uv_poll_start(). Null with the exception pending. */
  static LoopPoll* start(Napi::Env env, int descriptor, int events, LoopOwner& owner);

  void ref() { uv_ref(reinterpret_cast<uv_handle_t*>(&handle_)); }
  void unref() { uv_unref(reinterpret_cast<uv_handle_t*>(&handle_)); }
  /** The owner is not called any more, and the loop is not kept alive; the handle stays. */
  void stop() { uv_poll_stop(&handle_); }
  /** The owner is not called any more, and the descriptor may be closed; the loop deletes this. */
  void close();

 private:
  static void onReady(uv_poll_t* handle, int status, int events);
  static void onClosed(uv_handle_t* handle);
  static void onEnvironmentEnd(napi_async_cleanup_hook_handle hook, void* data);

  uv_poll_t handle_;
  LoopOwner* owner_ = nullptr;
  napi_async_cleanup_hook_handle hook_ = nullptr;
};
