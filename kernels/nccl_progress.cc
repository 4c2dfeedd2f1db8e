// The thread of an NcclTransport: what is over, what has failed, the end.
#include <algorithm>
#include <utility>

#include "nccl_transport.h"

namespace smp {
namespace {

// Between two looks at what is on the streams: short while something happens.
constexpr auto kShortPause = std::chrono::microseconds(20);
constexpr auto kLongPause = std::chrono::microseconds(500);
constexpr auto kBetweenErrors = std::chrono::milliseconds(100);

// What a peer has sent before it left is there as soon as the device asks for it.
constexpr auto kDrainTime = std::chrono::seconds(1);

// When a peer dies NCCL may fail before UCX tells of the death, or at another rank that
// is well. So NCCL's errors are told when UCX must have told.
constexpr auto kNewsTime = std::chrono::seconds(1);

// How long a thread that is inside of NCCL is waited for before NCCL is told to end.
constexpr auto kIssueGrace = std::chrono::seconds(1);

// To leave, with what is still on the streams.
constexpr double kLeaveSeconds = 2;

}  // namespace

bool NcclTransport::IsBusyLocked() {
  return std::any_of(queues_.begin(), queues_.end(), [](const auto& queue) {
    return !queue->running.empty() || (queue->broken && !queue->aborted) ||
           (!queue->error.ok() && !queue->broken);
  });
}

void NcclTransport::Run() {
  auto pause = kShortPause;
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stop_ || IsBusyLocked(); });
      if (stop_) return;
    }
    bool progress = false;
    for (const auto& queue : Queues()) {
      EndIfLeft(queue.get());
      TellIfDue(queue.get());
      AbortIfDue(queue);
      progress |= Reap(queue.get());
    }
    LookForErrors();
    pause = progress ? kShortPause : std::min(2 * pause, decltype(pause)(kLongPause));
    std::this_thread::sleep_for(pause);
  }
}

// Reports what is over, in order; whether anything was.
bool NcclTransport::Reap(Queue* queue) {
  bool progress = false;
  while (true) {
    OperationPtr operation;
    bool is_over;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (queue->running.empty() || !queue->running.front()->issued) return progress;
      operation = queue->running.front();
      // What could not be launched may still be in part on the stream.
      is_over = operation->after == nullptr && queue->aborted;
      if (operation->after == nullptr && !is_over) return progress;
    }
    Status status;
    if (!is_over && !device_->IsOver(operation->after, &status)) return progress;
    progress = true;
    Calls calls;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue->running.pop_front();
      operations_.erase(operation->message.id);
      // A communicator that is given up lets its kernels end as if all were well.
      if (status.ok() && queue->aborted) status = queue->why;
      TellLocked(operation.get(), status, &calls);
      if (!status.ok()) GiveUpLocked(queue, status);
      changed_.notify_all();
    }
    CallAll(&calls);
  }
}

// Gives up what waits for a peer that has left. The device may come to it late, when it
// still computes what was asked for before; only from then on does the wait count.
void NcclTransport::EndIfLeft(Queue* queue) {
  std::vector<OperationPtr> batch;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!queue->left || queue->broken) return;
    for (const auto& each : queue->running) {
      if (!each->issued || each->after != queue->running.front()->after) break;
      batch.push_back(each);
    }
  }
  if (batch.empty()) return;
  Status ignored;  // Reap sees it
  for (const auto& each : batch) {
    if (!device_->IsOver(each->before, &ignored)) return;
  }
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (queue->asked != batch.front()->message.id) {
      queue->asked = batch.front()->message.id;
      queue->asked_at = Clock::now();
    }
    if (Clock::now() - queue->asked_at < kDrainTime) return;
    BreakLocked(queue, queue->why, 0, &calls);
  }
  CallAll(&calls);
}

void NcclTransport::AbortIfDue(const std::shared_ptr<Queue>& queue) {
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!queue->broken || queue->aborted) return;
    if (queue->aborting) {
      queue->aborted = queue->stream->HasEnded();
      if (queue->aborted) changed_.notify_all();
    } else if (Clock::now() >= queue->abort_at) {
      BreakLocked(queue.get(), queue->why, 0, &calls);
    }
  }
  CallAll(&calls);
}

void NcclTransport::Abort(std::shared_ptr<Queue> queue,
                          std::shared_ptr<NcclStream> stream) {
  std::thread([queue = std::move(queue), stream = std::move(stream)] {
    {
      // A thread that is stuck inside of NCCL gets out by the abort itself. No
      // timed_mutex, as not every thread sanitizer knows it.
      std::unique_lock<std::mutex> issuing(queue->issuing, std::try_to_lock);
      for (const auto until = Clock::now() + kIssueGrace;
           !issuing.owns_lock() && Clock::now() < until; issuing.try_lock()) {
        std::this_thread::sleep_for(kLongPause);
      }
    }
    // Who comes later sees that the queue is broken, and need not wait for the end.
    stream->Abort();
  }).detach();
}

void NcclTransport::LookForErrors() {
  if (Clock::now() < next_look_) return;
  next_look_ = Clock::now() + kBetweenErrors;
  for (const auto& queue : Queues()) {
    std::shared_ptr<NcclStream> stream;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!queue->running.empty() && !queue->broken) stream = queue->stream;
    }
    if (stream == nullptr) continue;
    const Status status = stream->AsyncError();
    if (status.ok()) continue;
    std::lock_guard<std::mutex> lock(mutex_);
    GiveUpLocked(queue.get(), status);
  }
}

// After an error of NCCL. One that has left may cause errors by that, see EndIfLeft.
void NcclTransport::GiveUpLocked(Queue* queue, const Status& error) {
  if (queue->broken || queue->left || !queue->error.ok()) return;
  queue->error = error;
  queue->tell_at = Clock::now() + kNewsTime;
  changed_.notify_all();
}

void NcclTransport::TellIfDue(Queue* queue) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool is_known = queue->error.ok() || queue->broken;
    if (is_known || Clock::now() < queue->tell_at) return;
  }
  // The other ranks first: who waits may bring the process down.
  failed_(queue->name + ": " + queue->error.text);
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    BreakLocked(queue, queue->error, 0, &calls);
  }
  CallAll(&calls);
}

// --- the end

bool NcclTransport::WaitUntil(double seconds, const std::function<bool()>& ready) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), ready);
}

bool NcclTransport::WaitForSends(double seconds) {
  return WaitUntil(seconds, [this] {
    return std::none_of(queues_.begin(), queues_.end(), [](const auto& queue) {
      return queue->sends && !queue->broken &&
             !(queue->running.empty() && queue->waiting.empty());
    });
  });
}

void NcclTransport::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void NcclTransport::Close(double seconds) {
  WaitForSends(seconds);
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) return;
    for (const auto& queue : queues_) {
      BreakLocked(queue.get(), {Code::kNotConnected, "this rank has left the job"}, 0,
                  &calls);
    }
  }
  CallAll(&calls);
  // The thread aborts the communicators, and lets go of the memory.
  WaitUntil(kLeaveSeconds, [this] { return !IsBusyLocked(); });
  Stop();
}

void NcclTransport::CloseAtExit() {
  Stop();
  // Never destroyed: what is left belongs to libraries that may be gone.
  static auto* const kept = new std::vector<std::shared_ptr<NcclStream>>;
  for (const auto& queue : queues_) kept->push_back(queue->stream);
}

}  // namespace smp
