#include "loop_poll.h"

#include <memory>

#include "support.h"

LoopPoll* LoopPoll::start(Napi::Env env, int descriptor, int events, LoopOwner& owner) {
  uv_loop_t* loop = nullptr;
  napi_get_uv_event_loop(env, &loop);
  auto unique = std::make_unique<LoopPoll>();
  if (const int status = uv_poll_init(loop, &unique->handle_, descriptor); status != 0) {
    throwSystemError(env, {-status, "uv_poll_init", {}});
    return nullptr;
  }
  // From here on the loop has the handle.
  LoopPoll* poll = unique.release();
  poll->handle_.data = poll;
  poll->owner_ = &owner;
  napi_add_async_cleanup_hook(env, onEnvironmentEnd, poll, &poll->hook_);
  const int status = uv_poll_start(&poll->handle_, events, onReady);
  if (status == 0) return poll;
  poll->close();
  throwSystemError(env, {-status, "uv_poll_start", {}});
  return nullptr;
}

void LoopPoll::close() {
  owner_ = nullptr;
  uv_close(reinterpret_cast<uv_handle_t*>(&handle_), onClosed);
}

void LoopPoll::onReady(uv_poll_t* handle, int, int) {
  if (auto* owner = static_cast<LoopPoll*>(handle->data)->owner_; owner != nullptr) owner->wake();
}

void LoopPoll::onClosed(uv_handle_t* handle) {
  const std::unique_ptr<LoopPoll> poll(static_cast<LoopPoll*>(handle->data));
  napi_remove_async_cleanup_hook(poll->hook_);
}

void LoopPoll::onEnvironmentEnd(napi_async_cleanup_hook_handle, void* data) {
  if (auto* owner = static_cast<LoopPoll*>(data)->owner_; owner != nullptr) owner->shut();
}
