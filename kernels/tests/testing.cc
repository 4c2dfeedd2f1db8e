#include "testing.h"

namespace smp::testing {

Buffer TextBuffer(const std::string& text) {
  auto owner = std::make_shared<std::string>(text);
  return {owner->data(), owner->size(), owner};
}

Status Await(Job& job, const TicketPtr& ticket) {
  job.mailbox().Wait(ticket, [](const Status&) {});
  CHECK(ticket->WaitFor(kTestSeconds));
  return ticket->status();
}

Status Rank::Join(std::unique_ptr<Job>* job) {
  const Status status = JoinWithoutStart(job);
  return status.ok() ? (*job)->Start() : status;
}

Status Rank::JoinWithoutStart(std::unique_ptr<Job>* job) {
  *job = std::make_unique<Job>(options);
  std::string address;
  Status status = (*job)->Open(&address);
  if (!status.ok()) return status;
  const auto addresses = Exchange(address);
  for (int peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    status = (*job)->Connect(peer, addresses[peer].data());
    if (!status.ok()) return status;
  }
  return {};
}

void Rank::Send(Job& job, int peer, uint32_t channel, const std::string& text) {
  auto route = std::make_shared<Route>(Route{peer, channel, "text"});
  const Status status = job.mailbox().PostSend(route, nullptr, TextBuffer(text));
  CHECK_EQ(status.text, "");
}

std::string Rank::Recv(Job& job, int peer, uint32_t channel, size_t bytes) {
  auto text = std::make_shared<std::string>(bytes, '?');
  auto route = std::make_shared<Route>(Route{peer, channel, "text"});
  const Buffer buffer = {text->data(), bytes, text};
  const Status status = Await(job, job.mailbox().Recv(route, Part::kPayload, buffer));
  CHECK_EQ(status.text, "");
  return *text;
}

Status Rank::TryRecv(Job& job, int peer, uint32_t channel, size_t bytes) {
  auto route = std::make_shared<Route>(Route{peer, channel, "text"});
  return Await(job, job.mailbox().Recv(route, Part::kPayload,
                                       TextBuffer(std::string(bytes, '?'))));
}

void RunRanks(const char* name, int size, const std::function<void(Rank&)>& body,
              const std::vector<int>& signals) {
  const auto with_job = [&body](Process& process) {
    Rank self(process);
    self.options.rank = self.rank;
    self.options.size = self.size;
    self.options.timeout_seconds = kTestSeconds;
    self.options.job_id = "a test";
    self.options.net_devices = "lo";
    body(self);
  };
  RunProcesses(name, size, with_job, signals);
}

}  // namespace smp::testing
