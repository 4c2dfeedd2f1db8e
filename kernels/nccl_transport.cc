#include "nccl_transport.h"

#include <algorithm>
#include <cstdio>
#include <tuple>
#include <utility>

namespace smp {
namespace {

// What others wait for does not end in the middle when a peer leaves.
constexpr double kDrainSeconds = 1;

std::string SecondsText(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", seconds);
  return text;
}

}  // namespace

NcclTransport::NcclTransport(int size, std::shared_ptr<GpuDevice> device,
                             const Nccl* nccl, Failed failed)
    : device_(std::move(device)), nccl_(nccl), failed_(std::move(failed)) {
  for (int peer = 0; peer < size; ++peer) {
    for (const Way way : {Way::kSend, Way::kRecv}) {
      auto queue = std::make_shared<Queue>();
      queue->peers = {peer};
      queue->sends = way == Way::kSend;
      queue->name = (queue->sends ? "messages to rank " : "messages from rank ") +
                    std::to_string(peer);
      queues_.push_back(std::move(queue));
    }
  }
  thread_ = std::thread([this] { Run(); });
}

NcclTransport::~NcclTransport() { Close(0); }

NcclTransport::Queue* NcclTransport::QueueOf(int peer, Way way) {
  std::lock_guard<std::mutex> lock(mutex_);
  return queues_[2 * peer + (way == Way::kSend ? 0 : 1)].get();
}

std::vector<std::shared_ptr<NcclTransport::Queue>> NcclTransport::Queues() {
  std::lock_guard<std::mutex> lock(mutex_);
  return queues_;
}

// --- lanes

Status NcclTransport::MakeId(const Nccl& nccl, std::string* id) {
  NcclId made;
  const NcclResult result = nccl.GetUniqueId(&made);
  if (result != kNcclSuccess) {
    return {Code::kUnavailable, "ncclGetUniqueId: " + nccl.Text(result)};
  }
  id->assign(made.bytes, sizeof made.bytes);
  return {};
}

Status NcclTransport::Connect(int peer, Way way, const std::string& id,
                              double seconds) {
  return ConnectQueue(QueueOf(peer, way),
                      std::make_shared<NcclLane>(device_, nccl_, way), id, seconds);
}

Status NcclTransport::ConnectGroup(const std::vector<int>& ranks, int rank,
                                   const std::string& id, double seconds, int* group) {
  const auto found = std::find(ranks.begin(), ranks.end(), rank);
  if (found == ranks.end()) {
    return {Code::kInvalid, "this rank is none of the group; rank=" +
                                std::to_string(rank)};
  }
  auto made = std::make_shared<Queue>();
  made->sends = true;
  made->name = "sums of ranks";
  for (const int each : ranks) {
    made->name += (each == ranks.front() ? " " : ", ") + std::to_string(each);
    if (each != rank) made->peers.push_back(each);
  }
  Queue* const queue = made.get();
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    *group = static_cast<int>(queues_.size());
    // One that has failed by now would be missed.
    for (const auto& other : queues_) {
      const auto& peers = made->peers;
      if (other->broken && other->peers.size() == 1 &&
          std::count(peers.begin(), peers.end(), other->peers.front()) > 0) {
        BreakLocked(queue, other->why, 0, &calls);
      }
    }
    queues_.push_back(std::move(made));
  }
  const int place = static_cast<int>(found - ranks.begin());
  const int size = static_cast<int>(ranks.size());
  return ConnectQueue(queue,
                      std::make_shared<NcclGroup>(device_, nccl_, size, place), id,
                      seconds);
}

Status NcclTransport::ConnectQueue(Queue* queue, std::shared_ptr<NcclStream> stream,
                                   const std::string& id, double seconds) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (queue->broken) return queue->why;
  }
  // NCCL keeps its caller until the others are there, and cannot be called off. So a
  // thread waits, which may be left behind.
  struct Meeting {
    std::mutex mutex;
    std::condition_variable changed;
    bool over = false, given_up = false;
    Status status;
  };
  const auto meeting = std::make_shared<Meeting>();
  std::thread([stream, meeting, id] {
    const Status status = stream->Connect(id);
    std::lock_guard<std::mutex> lock(meeting->mutex);
    meeting->over = true;
    meeting->status = status;
    if (meeting->given_up) stream->Abort();
    meeting->changed.notify_all();
  }).detach();

  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  Status verdict;
  {
    std::unique_lock<std::mutex> lock(meeting->mutex);
    while (!meeting->over && verdict.ok()) {
      meeting->changed.wait_for(lock, std::chrono::milliseconds(20));
      if (meeting->over) break;
      std::lock_guard<std::mutex> own(mutex_);
      if (queue->broken) {
        verdict = queue->why;
      } else if (Clock::now() >= until) {
        verdict = {Code::kDeadline, "no connection by NCCL for " + queue->name +
                                        " within timeout_s=" + SecondsText(seconds)};
      }
    }
    meeting->given_up = !meeting->over;
    if (meeting->over) verdict = meeting->status;
  }
  if (!verdict.ok()) return verdict;
  std::lock_guard<std::mutex> lock(mutex_);
  if (queue->broken) return queue->why;
  queue->stream = stream;
  return {};
}

bool NcclTransport::IsConnected(int peer, Way way) {
  Queue* const queue = QueueOf(peer, way);
  std::lock_guard<std::mutex> lock(mutex_);
  return queue->stream != nullptr;
}

// --- messages

void NcclTransport::Send(Message message, Done done) {
  Queue* const queue = QueueOf(message.peer, Way::kSend);
  Submit(queue, std::move(message), /*ready=*/true, std::move(done));
}

void NcclTransport::Recv(Message message, Done done) {
  Queue* const queue = QueueOf(message.peer, Way::kRecv);
  Submit(queue, std::move(message), /*ready=*/true, std::move(done));
}

void NcclTransport::Reserve(Message message, Done done) {
  Queue* const queue = QueueOf(message.peer, Way::kRecv);
  Submit(queue, std::move(message), /*ready=*/false, std::move(done));
}

void NcclTransport::AllReduce(Message message, Done done) {
  Queue* const queue = Queues()[message.peer].get();
  Submit(queue, std::move(message), /*ready=*/true, std::move(done));
}

void NcclTransport::Submit(Queue* queue, Message message, bool ready, Done done) {
  const bool more = message.more;
  auto operation = std::make_shared<Operation>();
  Status status;
  if (message.stream != nullptr) {
    status =
        device_->Record(static_cast<CudaStream>(message.stream), &operation->before);
  }
  operation->message = std::move(message);
  operation->ready = ready;
  operation->held = operation->message.hold;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (status.ok() && queue->broken) status = queue->why;
    if (status.ok() && queue->stream == nullptr) {
      status = {Code::kNotConnected,
                "there is no connection by NCCL for " + queue->name};
    }
    if (status.ok()) {
      operation->done = std::move(done);
      queue->waiting.push_back(operation);
      operations_.emplace(operation->message.id, std::make_pair(queue, operation));
    }
  }
  if (!status.ok()) return done(status);
  if (!more) Pump(queue);
}

void NcclTransport::Fill(uint64_t id, Buffer buffer) {
  Queue* queue = nullptr;
  OperationPtr operation;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = operations_.find(id);
    if (found == operations_.end()) return;  // has failed, and was told so
    std::tie(queue, operation) = found->second;
  }
  // The memory is younger than the message: what used it may have been put on the
  // stream in between. Nobody else touches these before it is ready.
  GpuEvent before;
  Status status;
  if (void* const stream = operation->message.stream) {
    status = device_->Record(static_cast<CudaStream>(stream), &before);
  }
  if (!status.ok()) return Cancel(id, status);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    operation->message.buffer = std::move(buffer);
    operation->before = before;
    operation->ready = true;
  }
  Pump(queue);
}

std::vector<NcclTransport::OperationPtr> NcclTransport::NextLocked(Queue* queue) {
  auto& waiting = queue->waiting;
  size_t count = 0;
  if (!queue->error.ok()) return {};
  // Who waits for one of a batch waits for all of it: only what belongs together.
  bool more = true;
  while (more && count < waiting.size() && waiting[count]->ready &&
         !waiting[count]->held) {
    more = waiting[count++]->message.more;
  }
  // What follows is waited for, unless it is there and cannot go.
  if (more && count == waiting.size()) count = 0;
  std::vector<OperationPtr> batch(waiting.begin(), waiting.begin() + count);
  waiting.erase(waiting.begin(), waiting.begin() + count);
  queue->running.insert(queue->running.end(), batch.begin(), batch.end());
  return batch;
}

// Puts on the stream what can go there.
void NcclTransport::Pump(Queue* queue) {
  Calls calls;
  for (bool again = true; again;) {
    {
      std::lock_guard<std::mutex> issuing(queue->issuing);
      std::vector<OperationPtr> batch;
      std::shared_ptr<NcclStream> stream;
      std::vector<NcclStream::Item> items;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (queue->broken) return;
        batch = NextLocked(queue);
        stream = queue->stream;
        for (const auto& each : batch) {
          items.push_back({each->message.buffer, each->before, each->message.sum});
        }
      }
      again = !batch.empty();
      if (again) {
        GpuEvent after;
        const Status status = stream->Launch(items, &after);
        Launched(queue, batch, after, status, &calls);
      }
    }
    // Without a lock: who is told may post the next message at once.
    CallAll(&calls);
  }
}

void NcclTransport::Launched(Queue* queue, const std::vector<OperationPtr>& batch,
                             const GpuEvent& after, const Status& status,
                             Calls* calls) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& operation : batch) {
    operation->issued = true;
    operation->after = after;
    if (!status.ok()) continue;  // told when the queue breaks
    for (auto& [stream, told] : operation->joins) {
      calls->push_back([this, stream = stream, after, told = std::move(told)] {
        told(device_->Wait(static_cast<CudaStream>(stream), after));
      });
    }
    operation->joins.clear();
  }
  if (!status.ok()) GiveUpLocked(queue, status);
  changed_.notify_all();
}

void NcclTransport::Join(uint64_t id, void* stream, Done told) {
  GpuEvent after;
  Status status;
  Queue* released = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = operations_.find(id);
    if (found != operations_.end()) {
      const auto& [queue, operation] = found->second;
      after = operation->after;
      if (queue->broken) {
        status = queue->why;  // its end, if it comes to one, gives no data
      } else if (after == nullptr) {
        operation->joins.emplace_back(stream, std::move(told));
        ReleaseLocked(queue, operation);
        released = queue;
      }
    }
  }
  if (released != nullptr) return Pump(released);
  if (status.ok()) status = device_->Wait(static_cast<CudaStream>(stream), after);
  told(status);
}

// Those that were held back up to `last`, which go first.
void NcclTransport::ReleaseLocked(Queue* queue, const OperationPtr& last) {
  const auto& waiting = queue->waiting;
  if (std::count(waiting.begin(), waiting.end(), last) == 0) return;
  for (const auto& each : waiting) {
    each->held = false;
    if (each == last) return;
  }
}

bool NcclTransport::Holds(uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  return operations_.count(id) > 0;
}

// --- failures

void NcclTransport::CallAll(Calls* calls) {
  for (auto& call : *calls) call();
  calls->clear();
}

void NcclTransport::TellLocked(Operation* operation, const Status& status,
                               Calls* calls) {
  for (auto& [stream, told] : operation->joins) {
    calls->push_back([told = std::move(told), status] { told(status); });
  }
  operation->joins.clear();
  if (!operation->done) return;
  calls->push_back([done = std::exchange(operation->done, nullptr), status] {
    done(status);
  });
}

void NcclTransport::BreakLocked(Queue* queue, const Status& why, double grace,
                                Calls* calls) {
  const auto at = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                     std::chrono::duration<double>(grace));
  if (!queue->broken) {
    queue->broken = true;
    queue->why = why;
    queue->abort_at = at;
    queue->aborted = queue->stream == nullptr;
  }
  queue->abort_at = std::min(queue->abort_at, at);
  for (const auto& operation : std::exchange(queue->waiting, {})) {
    TellLocked(operation.get(), queue->why, calls);
    operations_.erase(operation->message.id);
    calls->push_back([operation] {});  // its memory goes without the lock
  }
  if (grace == 0) {
    if (!queue->aborting && !queue->aborted && !stop_) {
      queue->aborting = true;
      calls->push_back([queue = queue->shared_from_this(), stream = queue->stream] {
        Abort(queue, stream);
      });
    }
    // Reported now; the memory is kept until nothing touches it any more.
    for (const auto& each : queue->running) TellLocked(each.get(), queue->why, calls);
  }
  changed_.notify_all();
}

void NcclTransport::Cancel(uint64_t id, const Status& why) {
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = operations_.find(id);
    if (found == operations_.end()) return;
    const auto [queue, operation] = found->second;
    TellLocked(operation.get(), why, &calls);
    BreakLocked(queue,
                {Code::kUnavailable,
                 "one of the " + queue->name +
                     " was given up, and with it those behind it: " + why.text},
                0, &calls);
  }
  CallAll(&calls);
}

void NcclTransport::Break(int peer, const Status& why, bool drain) {
  Calls calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& queue : queues_) {
      const auto& peers = queue->peers;
      if (std::count(peers.begin(), peers.end(), peer) == 0) continue;
      if (drain && !queue->sends && queue->stream != nullptr && !queue->broken) {
        // What it has sent is here, or on the device, and may be received.
        queue->left = true;
        queue->why = why;
        continue;
      }
      BreakLocked(queue.get(), why, drain ? kDrainSeconds : 0, &calls);
    }
  }
  CallAll(&calls);
}

}  // namespace smp
