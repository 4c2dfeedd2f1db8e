// The C interface, for ctypes and for the tests of messages between ranks.
//
// 0 or a positive value is success; -1 is failure, and smp_last_error() tells the
// calling thread why. Every function may be called from any thread. A buffer given to
// smp_post_* must stay alive until smp_wait has returned 0 or -1, or smp_cancel has
// returned.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

#include "c_api.h"
#include "job.h"

namespace smp {
namespace {

thread_local std::string last_error;

}  // namespace

int Fail(const std::string& text) {
  last_error = text;
  return -1;
}

int Result(const Status& status) { return status.ok() ? 0 : Fail(status.text); }

int CopyText(const std::string& text, char* out, size_t capacity) {
  if (capacity == 0) return 0;
  const size_t length = text.copy(out, capacity - 1);
  out[length] = '\0';
  return static_cast<int>(length);
}

namespace {

// How long a failed request may keep its buffer before it is certain that its peer is
// gone and nobody will write to it.
constexpr double kReleaseSeconds = 1;

// The requests of smp_post_* that nobody has waited for to the end.
struct Request {
  TicketPtr ticket;
  bool watched = false;  // its deadline counts from the first smp_wait
};
struct Requests {
  std::mutex mutex;
  std::unordered_map<int64_t, Request> live;
};
Requests& GetRequests() {
  static auto* requests = new Requests;
  return *requests;
}

int64_t Remember(const TicketPtr& ticket) {
  const auto id = static_cast<int64_t>(ticket->id());
  Requests& requests = GetRequests();
  std::lock_guard<std::mutex> lock(requests.mutex);
  requests.live.emplace(id, Request{ticket});
  return id;
}

// Null: there is no such request. `first`: nobody has waited for it yet.
TicketPtr Find(int64_t id, bool* first) {
  Requests& requests = GetRequests();
  std::lock_guard<std::mutex> lock(requests.mutex);
  const auto found = requests.live.find(id);
  if (found == requests.live.end()) return nullptr;
  *first = !std::exchange(found->second.watched, true);
  return found->second.ticket;
}

void Forget(int64_t id) {
  Requests& requests = GetRequests();
  std::lock_guard<std::mutex> lock(requests.mutex);
  requests.live.erase(id);
}

// Returns once the caller may free the buffer of a request that has failed.
void AwaitRelease(int64_t id) {
  const auto job = CurrentJob();
  const auto until =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(kReleaseSeconds);
  while (job && job->transport().Holds(static_cast<uint64_t>(id)) &&
         std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

RoutePtr ObjectRoute(int peer, uint32_t channel) {
  return std::make_shared<Route>(Route{peer, channel, "an object"});
}

// One thread at a time opens or closes.
std::mutex& LifeMutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

}  // namespace
}  // namespace smp

using smp::CurrentJob;
using smp::Fail;
using smp::Remember;
using smp::Result;

SMP_API const char* smp_last_error() { return smp::last_error.c_str(); }

// Opens this rank's part of a job and writes the address that its peers connect to.
// `net_devices`: UCX_NET_DEVICES, or NULL. Returns the address's length in bytes.
SMP_API int smp_open(int rank, int size, double timeout_s, const char* job_id,
                     const char* net_devices, void* address, size_t capacity) {
  std::lock_guard<std::mutex> lock(smp::LifeMutex());
  if (CurrentJob()) return Fail("a job is open already; call smp_close first");
  smp::Job::Options options;
  options.rank = rank;
  options.size = size;
  options.timeout_seconds = timeout_s;
  options.job_id = job_id;
  if (net_devices != nullptr) options.net_devices = net_devices;
  if (size < 1 || size > smp::kMaxRanks || rank < 0 || rank >= size ||
      !(timeout_s > 0) || options.job_id.size() > smp::kMaxJobId) {
    return Fail(
        "need 0 <= rank < size <= " + std::to_string(smp::kMaxRanks) +
        ", timeout_s > 0 and a job id of at most " + std::to_string(smp::kMaxJobId) +
        " bytes; rank=" + std::to_string(rank) + " size=" + std::to_string(size) +
        " timeout_s=" + std::to_string(timeout_s) + " job_id=" + job_id);
  }
  auto job = std::make_shared<smp::Job>(options);
  std::string bytes;
  const smp::Status status = job->Open(&bytes);
  if (!status.ok()) return Fail(status.text);
  if (bytes.size() > capacity) {
    return Fail("the buffer is too small for the address; capacity=" +
                std::to_string(capacity) + " length=" + std::to_string(bytes.size()));
  }
  std::memcpy(address, bytes.data(), bytes.size());
  smp::SetCurrentJob(std::move(job));
  return static_cast<int>(bytes.size());
}

// `address` is what smp_open wrote on rank `peer`.
SMP_API int smp_connect(int peer, const void* address, size_t length) {
  const auto job = CurrentJob();
  if (!job) return Fail(smp::kNotOpen);
  if (peer < 0 || peer >= job->options().size || peer == job->options().rank ||
      length == 0) {
    return Fail("peer must be another rank of the job, with an address; peer=" +
                std::to_string(peer) + " length=" + std::to_string(length));
  }
  return Result(job->Connect(peer, address));
}

// Starts progress and shakes hands with every peer, within timeout_s.
SMP_API int smp_start() {
  const auto job = CurrentJob();
  return job ? Result(job->Start()) : Fail(smp::kNotOpen);
}

// `synchronous`: complete once the peer has made the matching receive.
SMP_API int64_t smp_post_send(int peer, uint32_t channel, const void* data,
                              size_t bytes, int synchronous) {
  const auto job = CurrentJob();
  if (!job) return Fail(smp::kNotOpen);
  return Remember(job->mailbox().Send(smp::ObjectRoute(peer, channel),
                                      {const_cast<void*>(data), bytes, nullptr},
                                      synchronous != 0));
}

SMP_API int64_t smp_post_recv(int peer, uint32_t channel, void* data, size_t bytes) {
  const auto job = CurrentJob();
  if (!job) return Fail(smp::kNotOpen);
  return Remember(job->mailbox().Recv(smp::ObjectRoute(peer, channel),
                                      smp::Part::kPayload, {data, bytes, nullptr}));
}

// 0: done. 1: still waiting after `seconds`. -1: failed, or waited timeout_s in all.
SMP_API int smp_wait(int64_t request, double seconds) {
  bool first = false;
  const smp::TicketPtr ticket = smp::Find(request, &first);
  if (!ticket) return Fail("no such request; request=" + std::to_string(request));
  const auto job = CurrentJob();
  if (first && job) job->mailbox().Wait(ticket, [job](const smp::Status&) {});
  if (!ticket->WaitFor(seconds)) return 1;
  const smp::Status status = ticket->status();
  if (!status.ok()) smp::AwaitRelease(request);
  smp::Forget(request);
  return Result(status);
}

// Ends a request that is still waiting; it need not be waited for any more.
SMP_API int smp_cancel(int64_t request) {
  bool first = false;
  const smp::TicketPtr ticket = smp::Find(request, &first);
  if (!ticket) return Fail("no such request; request=" + std::to_string(request));
  if (const auto job = CurrentJob()) {
    job->mailbox().Cancel(ticket, {smp::Code::kCancelled, "cancelled"});
  }
  smp::AwaitRelease(request);
  smp::Forget(request);
  return 0;
}

// Tells all peers why this rank gives up; takes a second at most.
SMP_API int smp_abort(const char* reason) {
  if (const auto job = CurrentJob()) job->Abort(reason);
  return 0;
}

// 1, and how, when this rank knows of a rank that has failed (itself included).
SMP_API int smp_failure(char* text, size_t capacity) {
  const auto job = CurrentJob();
  std::string failure;
  if (!job || !job->Failure(&failure)) return 0;
  smp::CopyText(failure, text, capacity);
  return 1;
}

// Leaves the job, waiting at most `seconds` for the peers to leave as well.
SMP_API int smp_close(double seconds) {
  std::lock_guard<std::mutex> lock(smp::LifeMutex());
  const auto job = CurrentJob();
  if (!job) return 0;
  const smp::Status status = job->Close(seconds);
  smp::SetCurrentJob(nullptr);
  return Result(status);
}

// Which UCX transports lead to `peer`: "data: posix/memory ...; monitor: tcp/lo".
SMP_API int smp_describe(int peer, char* out, size_t capacity) {
  const auto job = CurrentJob();
  if (!job) return Fail(smp::kNotOpen);
  if (peer < 0 || peer >= job->options().size) return Fail("no such peer");
  return smp::CopyText(job->Describe(peer), out, capacity);
}
