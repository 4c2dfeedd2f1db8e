// The half of UcxTransport that posts messages and learns what became of them; the
// other half, ucx_transport.cc, is its life and its thread.
#include <algorithm>

#include "ucx_context.h"
#include "ucx_transport.h"

namespace smp {

void UcxTransport::Send(Message message, Done done) {
  Submit(What::kSend, std::move(message), std::move(done));
}

void UcxTransport::Recv(Message message, Done done) {
  Submit(What::kRecv, std::move(message), std::move(done));
}

void UcxTransport::Submit(What what, Message message, Done done) {
  auto request = std::make_unique<Request>();
  request->transport = this;
  request->what = what;
  request->message = std::move(message);
  Status verdict;
  {
    Hold hold(this);
    const Peer& peer = peers_[request->message.peer];
    ucp_tag_recv_info_t info = {};
    const bool has_arrived = what == What::kRecv && worker_ != nullptr &&
                             HasArrivedLocked(request->message, &info.length);
    const bool may_pass = !peer.broken || (peer.drain && has_arrived);
    if (worker_ == nullptr || peer.data == nullptr) {
      verdict = {Code::kNotConnected, "the transport is not connected"};
    } else if (!may_pass) {
      verdict = peer.why;
    } else {
      const ucs_status_ptr_t posted = PostLocked(request.get(), &info);
      if (UCS_PTR_IS_PTR(posted)) {
        request->ucx = posted;
        request->done = std::move(done);
        const uint64_t id = request->message.id;
        requests_.emplace(id, std::move(request));
        hold.WakeProgress();
        return;
      }
      verdict = Verdict(*request, UCS_PTR_STATUS(posted), info.length);
    }
  }
  done(verdict);
}

ucs_status_ptr_t UcxTransport::PostLocked(Request* request, ucp_tag_recv_info_t* info) {
  const Message& message = request->message;
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  params.user_data = request;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  if (request->what == What::kRecv) {
    params.op_attr_mask |= UCP_OP_ATTR_FIELD_RECV_INFO;
    params.recv_info.tag_info = info;
    params.cb.recv = &UcxTransport::OnReceived;
    return ucp_tag_recv_nbx(worker_, message.buffer.data, message.buffer.bytes,
                            message.tag, ~ucp_tag_t{0}, &params);
  }
  params.cb.send = &UcxTransport::OnSent;
  const auto send = message.synchronous ? &ucp_tag_send_sync_nbx : &ucp_tag_send_nbx;
  return send(peers_[message.peer].data, message.buffer.data, message.buffer.bytes,
              message.tag, &params);
}

// UCX does not say how long a message was that was too long; so it is asked before.
bool UcxTransport::HasArrivedLocked(const Message& message, size_t* bytes) {
  ucp_tag_recv_info_t info;
  if (ucp_tag_probe_nb(worker_, message.tag, ~ucp_tag_t{0}, /*remove=*/0, &info) ==
      nullptr) {
    return false;
  }
  *bytes = info.length;
  return true;
}

void UcxTransport::SendControl(int rank, Lane lane, const std::string& bytes) {
  Hold hold(this);
  Peer& peer = peers_[rank];
  if (worker_ == nullptr || peer.down) return;
  const ucp_ep_h endpoint = lane == Lane::kData ? peer.data : peer.monitor;
  if (endpoint != nullptr) PostControl(endpoint, bytes, UCP_AM_SEND_FLAG_REPLY);
  hold.WakeProgress();
}

void UcxTransport::Reply(ucp_ep_h reply, const std::string& bytes) {
  Hold hold(this);
  if (worker_ != nullptr) PostControl(reply, bytes, 0);
  hold.WakeProgress();
}

void UcxTransport::PostControl(ucp_ep_h endpoint, const std::string& bytes,
                               uint32_t flags) {
  auto request = std::make_unique<Request>();
  request->transport = this;
  request->what = What::kControl;
  request->message.id = NextId();
  auto owner = std::make_shared<std::string>(bytes);
  request->message.buffer = {owner->data(), owner->size(), owner};
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_FLAGS;
  params.user_data = request.get();
  params.cb.send = &UcxTransport::OnSent;
  params.flags = flags | UCP_AM_SEND_FLAG_EAGER;
  request->ucx = ucp_am_send_nbx(endpoint, kControlId, nullptr, 0, owner->data(),
                                 owner->size(), &params);
  if (!UCS_PTR_IS_PTR(request->ucx)) return;  // sent, or failed: OnError tells
  const uint64_t id = request->message.id;
  requests_.emplace(id, std::move(request));
}

ucs_status_t UcxTransport::OnMessage(void* user, const void*, size_t, void* data,
                                     size_t bytes, const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxTransport*>(user);
  if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) return UCS_OK;  // not from us
  const bool has_reply = param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP;
  self->events_.push_back([self,
                           text = std::string(static_cast<const char*>(data), bytes),
                           reply = has_reply ? param->reply_ep : nullptr] {
    self->listener_->OnControl(text, reply);
  });
  return UCS_OK;
}

void UcxTransport::OnSent(void* ucx, ucs_status_t status, void* user) {
  auto* request = static_cast<Request*>(user);
  request->transport->CompleteLocked(request, status, 0);
  ucp_request_free(ucx);
}

void UcxTransport::OnReceived(void* ucx, ucs_status_t status,
                              const ucp_tag_recv_info_t* info, void* user) {
  auto* request = static_cast<Request*>(user);
  request->transport->CompleteLocked(request, status, info->length);
  ucp_request_free(ucx);
}

void UcxTransport::OnError(void* user, ucp_ep_h, ucs_status_t status) {
  auto* peer = static_cast<Peer*>(user);
  peer->down = true;
  UcxTransport* self = peer->transport;
  self->events_.push_back([self, rank = peer->rank, status] {
    self->listener_->OnPeerDown(rank, ucs_status_string(status));
  });
}

Status UcxTransport::Verdict(const Request& request, ucs_status_t status,
                             size_t bytes) {
  const bool is_recv = request.what == What::kRecv;
  const size_t expected = request.message.buffer.bytes;
  if (status == UCS_ERR_CANCELED) return {Code::kCancelled, "cancelled"};
  if (status == UCS_ERR_MESSAGE_TRUNCATED ||
      (status == UCS_OK && is_recv && bytes != expected)) {
    return {Code::kDataLoss,
            "the two ends disagree about the size of a message; sent_bytes=" +
                std::to_string(bytes) + " expected_bytes=" + std::to_string(expected)};
  }
  if (status != UCS_OK) return UcxError("message lost", status);
  return {};
}

void UcxTransport::CompleteLocked(Request* request, ucs_status_t status, size_t bytes) {
  const auto found = requests_.find(request->message.id);
  if (request->done) {
    const Status verdict = Verdict(*request, status, bytes);
    events_.push_back(
        [this, verdict, rank = request->message.peer, done = std::move(request->done)] {
          Status told = verdict;
          if (told.code == Code::kUnavailable) {
            // The message noticed before the monitor did. Let the listener decide who
            // is to blame, and say the same about this message as about all the others.
            listener_->OnPeerDown(rank, told.text);
            Hold hold(this);
            if (peers_[rank].broken) told = peers_[rank].why;
          }
          done(told);
        });
  }
  requests_.erase(found);
}

void UcxTransport::GiveUpLocked(Request* request, const Status& why) {
  if (!request->done) return;
  events_.push_back([why, done = std::move(request->done)] { done(why); });
  request->done = nullptr;
  // A receive that nothing has matched ends at once, within this call. One that is
  // being filled, and any send, stays in requests_ with its buffer until UCX lets go of
  // it.
  if (request->what == What::kRecv) ucp_request_cancel(worker_, request->ucx);
}

void UcxTransport::Cancel(uint64_t id, const Status& why) {
  Hold hold(this);
  const auto found = requests_.find(id);
  if (found != requests_.end()) GiveUpLocked(found->second.get(), why);
}

void UcxTransport::Break(int rank, const Status& why, bool drain) {
  Hold hold(this);
  Peer& peer = peers_[rank];
  peer.broken = true;
  peer.drain = drain;
  peer.why = why;
  std::vector<Request*> hit;
  for (const auto& [id, request] : requests_) {
    if (request->message.peer == rank) hit.push_back(request.get());
  }
  // Oldest first, so that errors come in the order of the posts.
  std::sort(hit.begin(), hit.end(), [](const Request* a, const Request* b) {
    return a->message.id < b->message.id;
  });
  for (Request* request : hit) GiveUpLocked(request, why);
}

bool UcxTransport::Holds(uint64_t id) {
  Hold hold(this);
  return requests_.count(id) > 0;
}

}  // namespace smp
