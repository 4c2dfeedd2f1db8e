#include "job.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace smp {
namespace {

using Lane = UcxTransport::Lane;

// After a failure, and at the end of the process: enough for a word to leave.
constexpr double kLastWordsSeconds = 0.5;

// Of the silence that condemns another host: the pause between two words to it. The
// silence of a connection is counted from a word on, and may begin with such a pause.
constexpr double kPauseShare = 1.0 / 6;

double Silence(const Job::Options& options) {
  return std::min(options.silence_seconds, options.timeout_seconds);
}

std::string RankText(int rank) { return "rank " + std::to_string(rank); }

// Never destroyed: the progress thread may outlive main().
struct Current {
  std::mutex mutex;
  std::shared_ptr<Job> job;
};
Current& GetCurrent() {
  static auto* current = new Current;
  return *current;
}

void AtExit() {
  if (auto job = CurrentJob()) job->LeaveAtExit();
}

}  // namespace

std::shared_ptr<Job> CurrentJob() {
  std::lock_guard<std::mutex> lock(GetCurrent().mutex);
  return GetCurrent().job;
}

void SetCurrentJob(std::shared_ptr<Job> job) {
  // Registered after UCX was loaded, so that it runs before UCX tears itself down.
  static const int registered = std::atexit(&AtExit);
  (void)registered;
  std::lock_guard<std::mutex> lock(GetCurrent().mutex);
  GetCurrent().job = std::move(job);
}

Job::Job(Options options)
    : options_(std::move(options)),
      transport_(options_.size, this),
      link_(LinkOver(&transport_)),
      watch_(
          options_.timeout_seconds, options_.stall_seconds,
          [this](const TicketPtr& ticket, const Status& why) {
            mailbox_.Cancel(ticket, why);
            if (Gpu* gpu = gpu_) gpu->mailbox.Cancel(ticket, why);
          },
          [this](const std::string& text) { Log(text); }),
      mailbox_(options_.rank, options_.size, link_ ? link_.get() : &transport_,
               &watch_),
      peers_(static_cast<size_t>(options_.size)),
      owner_(getpid()) {}

Job::~Job() {
  if (Gpu* gpu = gpu_) gpu->transport.Close(0);
  link_.reset();  // it may still have messages, and the mailbox to tell
  transport_.Close(0);
}

Status Job::Open(std::string* address) {
  return transport_.Open(options_.net_devices, (1 - kPauseShare) * Silence(options_),
                         address);
}

Status Job::Connect(int peer, const void* address) {
  const Status status = transport_.Connect(peer, address);
  const bool remote = status.ok() && !transport_.SharesMemory(peer);
  std::lock_guard<std::mutex> lock(mutex_);
  peers_[peer].connected = status.ok();
  peers_[peer].remote = remote;
  return status;
}

Status Job::Start() {
  transport_.Start();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    started_ = true;
  }
  // On both endpoints: the monitor must be wired up to notice a death, and the data
  // endpoint should not spend its first message of a step on it.
  Say(Word::kHello, Lane::kMonitor);
  Say(Word::kHello, Lane::kData);
  std::string missing, failure;
  const bool all = WaitForPeers(
      options_.timeout_seconds, [](const Peer& peer) { return peer.hellos >= 2; },
      &missing);
  if (Failure(&failure)) return {Code::kUnavailable, failure};
  if (all) return {};
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g", options_.timeout_seconds);
  return {Code::kDeadline,
          "no handshake with " + missing + " within timeout_s=" + seconds};
}

Job::Gpu::Gpu(const Options& options, std::shared_ptr<GpuDevice> device,
              const Nccl& nccl, NcclTransport::Failed failed, Watch* watch)
    : transport(options.size, std::move(device), &nccl, std::move(failed)),
      mailbox(options.rank, options.size, &transport, watch, /*runs_ahead=*/true) {}

Status Job::OpenGpu(int ordinal) {
  const Cuda& cuda = GetCuda();
  const Nccl& nccl = GetNccl();
  if (!cuda.usable()) return {Code::kInvalid, "no GPU: " + cuda.why_not};
  if (!nccl.usable()) return {Code::kInvalid, "no NCCL: " + nccl.why_not};
  const auto device = std::make_shared<GpuDevice>(&cuda);
  const Status status = device->Open(ordinal);
  if (!status.ok()) return status;
  const auto failed = [this](const std::string& why) {
    Fail(options_.rank,
         RankText(options_.rank) + " lost a connection by NCCL: " + why);
  };
  gpu_owner_ = std::make_unique<Gpu>(options_, device, nccl, failed, &watch_);
  gpu_ = gpu_owner_.get();
  return {};
}

Status Job::FindGpu(Gpu** gpu) {
  *gpu = gpu_;
  if (*gpu == nullptr) return {Code::kInvalid, "the GPU of this rank is not open"};
  std::string failure;
  if (Failure(&failure)) return {Code::kUnavailable, failure};
  return {};
}

Status Job::ConnectGpu(int peer, NcclTransport::Way way, const std::string& id) {
  Gpu* gpu = nullptr;
  const Status found = FindGpu(&gpu);
  if (!found.ok()) return found;
  return gpu->transport.Connect(peer, way, id, options_.timeout_seconds);
}

Status Job::ConnectGroup(const std::vector<int>& ranks, const std::string& id,
                         int* group) {
  Gpu* gpu = nullptr;
  const Status found = FindGpu(&gpu);
  if (!found.ok()) return found;
  return gpu->transport.ConnectGroup(ranks, options_.rank, id,
                                     options_.timeout_seconds, group);
}

void Job::Say(Word word, Lane lane, int culprit, const std::string& text) {
  Control control;
  control.word = word;
  control.source = options_.rank;
  control.culprit = culprit;
  control.job_id = options_.job_id;
  control.text = text;
  const std::string bytes = Encode(control);
  for (int peer = 0; peer < options_.size; ++peer) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!peers_[peer].connected || peers_[peer].dead) continue;
      if (word == Word::kAlive && (peers_[peer].leaving || !peers_[peer].remote)) {
        continue;
      }
    }
    transport_.SendControl(peer, lane, bytes);
  }
}

void Job::OnControl(const std::string& bytes, ucp_ep_h reply) {
  Control control;
  if (!Decode(bytes.data(), bytes.size(), &control) || control.source < 0 ||
      control.source >= options_.size || control.source == options_.rank) {
    Log("refused a message that is not from this job");
    return;
  }
  if (control.word == Word::kRefused) {
    Fail(control.source, RankText(control.source) +
                             " refused the handshake: it is in "
                             "another job");
    return;
  }
  if (control.job_id != options_.job_id) {
    Refuse(control, reply);
    return;
  }
  switch (control.word) {
    case Word::kHello:
      return OnHello(control.source);
    case Word::kFailed:
      return Fail(control.culprit, control.text);
    case Word::kLeaving:
      return OnLeaving(control.source, /*last=*/false);
    case Word::kLast:
      return OnLeaving(control.source, /*last=*/true);
    case Word::kRefused:  // seen above
    case Word::kAlive:    // its acknowledgement was all
      return;
  }
}

void Job::Refuse(const Control& stranger, ucp_ep_h reply) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // Once is enough: it says hello on two endpoints.
    if (!strangers_.insert(stranger.source).second) return;
  }
  Log("refused a handshake: the sender says it is rank " +
      std::to_string(stranger.source) + " but is in another job");
  if (reply == nullptr) return;
  Control control;
  control.word = Word::kRefused;
  control.source = options_.rank;
  transport_.Reply(reply, Encode(control));
}

void Job::OnHello(int peer) {
  std::lock_guard<std::mutex> lock(mutex_);
  peers_[peer].hellos++;
  changed_.notify_all();
}

void Job::OnLeaving(int peer, bool last) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    peers_[peer].leaving = true;
    changed_.notify_all();
    if (!last || peers_[peer].left || failed_) return;
    peers_[peer].left = true;
  }
  Break(peer, {Code::kUnavailable, RankText(peer) + " left the job"}, /*drain=*/true);
}

void Job::Break(int peer, const Status& why, bool drain) {
  transport_.Break(peer, why, drain);
  if (Gpu* gpu = gpu_) gpu->transport.Break(peer, why, drain);
}

void Job::OnPeerDown(int peer, const std::string& why) {
  bool leaving, remote;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    leaving = peers_[peer].leaving;
    remote = peers_[peer].remote;
    peers_[peer].leaving = peers_[peer].dead = true;
    changed_.notify_all();
  }
  if (leaving) {
    OnLeaving(peer, /*last=*/true);  // in case the word itself was lost
  } else {
    // UCX reports a death and a silence alike.
    Fail(peer, RankText(peer) + " died" + (remote ? " or is cut off" : "") + " (" +
                   why + ")");
  }
}

void Job::OnTick() {
  const auto now = Watch::Clock::now();
  watch_.Tick(now);
  if (now >= next_alive_) SayAlive(now);
}

void Job::SayAlive(Watch::Clock::time_point now) {
  const std::chrono::duration<double> pause(kPauseShare * Silence(options_));
  next_alive_ = now + std::chrono::duration_cast<Watch::Clock::duration>(pause);
  Say(Word::kAlive, Lane::kMonitor);
}

void Job::Fail(int culprit, const std::string& text) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failed_) return;
    failed_ = true;
    failure_ = text;
    changed_.notify_all();
  }
  // The others first: this rank's waiters may bring the process down.
  Say(Word::kFailed, Lane::kMonitor, culprit, text);
  for (int peer = 0; peer < options_.size; ++peer) {
    Break(peer, {Code::kUnavailable, text}, /*drain=*/false);
  }
}

void Job::Abort(const std::string& reason) {
  Fail(options_.rank, RankText(options_.rank) + " failed: " + reason);
  transport_.FlushControl(kLastWordsSeconds);
}

bool Job::Failure(std::string* text) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failed_) *text = failure_;
  return failed_;
}

bool Job::WaitForPeers(double seconds, const std::function<bool(const Peer&)>& ready,
                       std::string* missing) {
  const auto wanting = [&] {
    std::string ranks;
    for (int rank = 0; rank < options_.size; ++rank) {
      if (rank == options_.rank || ready(peers_[rank])) continue;
      if (!ranks.empty()) ranks += ", ";
      ranks += RankText(rank);
    }
    return ranks;
  };
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                    [&] { return failed_ || wanting().empty(); });
  *missing = wanting();
  return missing->empty();
}

Status Job::Close(double seconds) {
  const auto until = Watch::Clock::now() + std::chrono::duration<double>(seconds);
  const auto left = [&until] {
    const std::chrono::duration<double> rest = until - Watch::Clock::now();
    return std::max(rest.count(), 0.0);
  };
  std::string failure, missing;
  bool started;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    started = std::exchange(started_, false);
  }
  if (started) {
    // Everything this rank sent has arrived before it says kLast; see OnLeaving.
    if (!Failure(&failure)) {
      transport_.WaitForSends(left());
      if (Gpu* gpu = gpu_) gpu->transport.WaitForSends(left());
    }
    Say(Word::kLast, Lane::kData);
    Say(Word::kLeaving, Lane::kMonitor);
    transport_.FlushControl(kLastWordsSeconds);
    if (!Failure(&failure)) {
      WaitForPeers(left(), [](const Peer& peer) { return peer.leaving; }, &missing);
    }
  }
  if (Gpu* gpu = gpu_) gpu->transport.Close(0);
  transport_.Close(kLastWordsSeconds);
  if (!missing.empty() && !Failure(&failure)) {
    Log("left the job before " + missing);
  }
  return {};
}

void Job::LeaveAtExit() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // A forked child has the state, but neither the thread nor a say in the job.
    if (!started_ || getpid() != owner_) return;
    started_ = false;
  }
  Say(Word::kLast, Lane::kData);
  Say(Word::kLeaving, Lane::kMonitor);
  transport_.FlushControl(kLastWordsSeconds);
  if (Gpu* gpu = gpu_) gpu->transport.CloseAtExit();
  transport_.CloseAtExit();
}

void Job::Log(const std::string& text) const {
  std::fprintf(stderr, "smp_tf: rank %d: %s\n", options_.rank, text.c_str());
}

}  // namespace smp
