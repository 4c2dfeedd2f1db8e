#include "ucx_transport.h"

#include <poll.h>

#include <algorithm>
#include <chrono>

#include "ucx_context.h"

namespace smp {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kTick = std::chrono::milliseconds(100);
// UCX refuses to sleep while a full queue of a peer holds something back, and no event
// tells when there is room again. Try this often at full speed, then with longer and
// longer naps.
constexpr int kEagerTries = 200;
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kLongestNap = std::chrono::microseconds(2000);

}  // namespace

UcxTransport::UcxTransport(int size, Listener* listener)
    : listener_(listener), peers_(static_cast<size_t>(size)) {
  for (int rank = 0; rank < size; ++rank) {
    peers_[rank].transport = this;
    peers_[rank].rank = rank;
  }
}

UcxTransport::~UcxTransport() { Close(0); }

Status UcxTransport::Open(const std::string& net_devices, double silence_seconds,
                          std::string* address) {
  const int size = static_cast<int>(peers_.size());
  const Status opened =
      OpenUcx(size, net_devices, silence_seconds, &context_, &worker_);
  if (!opened.ok()) return opened;
  ucs_status_t status = ucp_worker_get_efd(worker_, &event_fd_);
  if (status != UCS_OK) return UcxError("UCX has no event descriptor", status);

  ucp_am_handler_param_t handler = {};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kControlId;
  handler.cb = &UcxTransport::OnMessage;
  handler.arg = this;
  status = ucp_worker_set_am_recv_handler(worker_, &handler);
  if (status != UCS_OK) return UcxError("UCX has no active messages", status);

  ucp_address_t* bytes = nullptr;
  size_t length = 0;
  status = ucp_worker_get_address(worker_, &bytes, &length);
  if (status != UCS_OK) return UcxError("UCX has no address", status);
  address->assign(reinterpret_cast<const char*>(bytes), length);
  ucp_worker_release_address(worker_, bytes);
  return {};
}

ucp_ep_h UcxTransport::MakeEndpoint(Peer* peer, const void* address, bool handle_errors,
                                    ucs_status_t* status) {
  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
  params.address = static_cast<const ucp_address_t*>(address);
  if (handle_errors) {
    params.field_mask |=
        UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &UcxTransport::OnError;
    params.err_handler.arg = peer;
  }
  ucp_ep_h endpoint = nullptr;
  *status = ucp_ep_create(worker_, &params, &endpoint);
  return *status == UCS_OK ? endpoint : nullptr;
}

Status UcxTransport::Connect(int rank, const void* address) {
  Hold hold(this);
  Peer& peer = peers_[rank];
  ucs_status_t status = UCS_OK;
  peer.data = MakeEndpoint(&peer, address, /*handle_errors=*/false, &status);
  if (peer.data != nullptr && !IsSharedMemory(EndpointTransports(peer.data))) {
    // Nothing to lose on another host, and errors are better handled than not.
    CloseEndpoint(peer.data, /*force=*/false, /*seconds=*/1);
    peer.data = MakeEndpoint(&peer, address, /*handle_errors=*/true, &status);
  }
  if (peer.data != nullptr) {
    peer.monitor = MakeEndpoint(&peer, address, /*handle_errors=*/true, &status);
  }
  if (status == UCS_OK) return {};
  return UcxError("cannot connect to rank " + std::to_string(rank), status);
}

void UcxTransport::Start() {
  thread_ = std::thread([this] { Run(); });
}

void UcxTransport::Run() {
  auto next_tick = Clock::now() + kTick;
  int fruitless = 0;
  std::vector<std::function<void()>> events;
  for (;;) {
    bool idle = false, sleep = false;
    // A mutex is not fair: without this, a busy transport keeps callers out.
    while (callers_.load() > 0) std::this_thread::yield();
    {
      std::lock_guard<std::mutex> lock(worker_mutex_);
      asleep_ = false;
      if (stop_) return;
      const unsigned progressed = ucp_worker_progress(worker_);
      events.swap(events_);
      idle = progressed == 0 && events.empty();
      // What happens after this makes event_fd_ readable, or sees asleep_ and signals.
      if (idle) sleep = asleep_ = ucp_worker_arm(worker_) == UCS_OK;
    }
    for (const auto& event : events) event();
    events.clear();
    if (sleep) {
      pollfd descriptor = {event_fd_, POLLIN, 0};
      poll(&descriptor, 1, std::chrono::milliseconds(kTick).count());
    }
    fruitless = idle && !sleep ? fruitless + 1 : 0;
    if (fruitless > kEagerTries) {
      std::this_thread::sleep_for(
          std::min(kNap * (fruitless - kEagerTries), kLongestNap));
    }
    if (Clock::now() >= next_tick) {
      listener_->OnTick();
      next_tick = Clock::now() + kTick;
    }
  }
}

std::string UcxTransport::Describe(int rank) {
  Hold hold(this);
  const Peer& peer = peers_[rank];
  if (peer.data == nullptr || peer.down) return "not connected";
  return "data: " + EndpointTransports(peer.data) +
         "; monitor: " + EndpointTransports(peer.monitor);
}

bool UcxTransport::SharesMemory(int rank) {
  Hold hold(this);
  const ucp_ep_h data = peers_[rank].data;
  return data != nullptr && IsSharedMemory(EndpointTransports(data));
}

bool UcxTransport::WaitUntil(double seconds, const std::function<bool()>& ready) {
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  for (;;) {
    {
      Hold hold(this);
      if (ready()) return true;
      hold.WakeProgress();
    }
    if (Clock::now() >= until || OnOwnThread()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

bool UcxTransport::WaitForSends(double seconds) {
  return WaitUntil(seconds, [this] {
    for (const auto& [id, request] : requests_) {
      if (request->what == What::kSend && request->done) return false;
    }
    return true;
  });
}

void UcxTransport::OnFlushed(void* ucx, ucs_status_t, void* user) {
  --static_cast<UcxTransport*>(user)->flushing_;
  ucp_request_free(ucx);
}

bool UcxTransport::FlushControl(double seconds) {
  {
    Hold hold(this);
    ucp_request_param_t params = {};
    params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    params.cb.send = &UcxTransport::OnFlushed;
    params.user_data = this;
    for (const Peer& peer : peers_) {
      if (peer.monitor == nullptr || peer.down) continue;
      if (UCS_PTR_IS_PTR(ucp_ep_flush_nbx(peer.monitor, &params))) ++flushing_;
    }
  }
  return WaitUntil(seconds, [this] { return flushing_ == 0; });
}

void UcxTransport::CloseEndpoint(ucp_ep_h endpoint, bool force, double seconds) {
  ucp_request_param_t params = {};
  if (force) {
    params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    params.flags = UCP_EP_CLOSE_FLAG_FORCE;
  }
  const ucs_status_ptr_t closing = ucp_ep_close_nbx(endpoint, &params);
  if (!UCS_PTR_IS_PTR(closing)) return;
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  while (ucp_request_check_status(closing) == UCS_INPROGRESS && Clock::now() < until) {
    if (ucp_worker_progress(worker_) == 0) std::this_thread::sleep_for(kNap);
  }
  ucp_request_free(closing);
}

void UcxTransport::Stop() {
  {
    Hold hold(this);
    stop_ = true;
    hold.WakeProgress();
  }
  if (thread_.joinable()) thread_.join();
}

void UcxTransport::Close(double seconds) {
  for (const auto& event : Destroy(seconds)) event();
}

void UcxTransport::CloseAtExit() { Destroy(0); }

std::vector<std::function<void()>> UcxTransport::Destroy(double seconds) {
  Stop();
  std::vector<std::function<void()>> events;
  {
    // From here on this thread is the only one that UCX sees.
    Hold hold(this);
    if (worker_ == nullptr) return events;
    const Status closed = {Code::kNotConnected, "the transport was closed"};
    std::vector<Request*> left;
    for (const auto& [id, request] : requests_) left.push_back(request.get());
    for (Request* request : left) GiveUpLocked(request, closed);
    for (Peer& peer : peers_) {
      // Only an endpoint that handles errors may be closed by force; the worker takes
      // the others of dead peers with it.
      if (peer.monitor != nullptr) CloseEndpoint(peer.monitor, peer.down, seconds);
      if (peer.data != nullptr && !peer.down) CloseEndpoint(peer.data, false, seconds);
      peer.data = peer.monitor = nullptr;
    }
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
    worker_ = nullptr;
    context_ = nullptr;
    asleep_ = false;
    // UCX is gone and cannot call back about these, but what it was told to read may be
    // mapped by a peer that still reads it: never freed.
    for (auto& [id, request] : requests_) request.release();
    requests_.clear();
    events.swap(events_);
  }
  return events;
}

}  // namespace smp
