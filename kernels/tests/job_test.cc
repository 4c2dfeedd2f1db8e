// Messages between real processes, when nothing goes wrong.
#include <atomic>
#include <random>
#include <thread>

#include "testing.h"

namespace smp::testing {
namespace {

using JobPtr = std::unique_ptr<Job>;

// Large enough for the protocol that waits for the receive before it moves any data.
constexpr size_t kLarge = 4 << 20;

std::string Pattern(size_t bytes, char seed) {
  std::string text(bytes, seed);
  for (size_t i = 0; i < bytes; i += 1000) text[i] = static_cast<char>(seed + i / 1000);
  return text;
}

void Finish(Rank& self, JobPtr& job) {
  CHECK_EQ(job->Close(20).text, "");
  self.Meet();
}

void MessagesOfAllSizes(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const int peer = 1 - self.rank;
  uint32_t channel = 0;
  for (const size_t bytes :
       {size_t{0}, size_t{1}, size_t{4000}, size_t{100000}, kLarge}) {
    self.Send(*job, peer, ++channel, Pattern(bytes, 'a' + self.rank));
    CHECK(self.Recv(*job, peer, channel, bytes) == Pattern(bytes, 'a' + peer));
  }
  Finish(self, job);
}

// The contract that schedules are checked against: a send waits for no receive.
void SendsNeverWaitForReceives(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const int peer = 1 - self.rank;
  const double start = Now();
  for (uint32_t i = 0; i < 64; ++i) {
    self.Send(*job, peer, i, Pattern(i % 2 ? 100 : 300000, 'a' + i % 20));
  }
  CHECK(Now() - start < 10);
  self.Meet();
  for (uint32_t i = 64; i-- > 0;) {  // in the other order
    const size_t bytes = i % 2 ? 100 : 300000;
    CHECK(self.Recv(*job, peer, i, bytes) == Pattern(bytes, 'a' + i % 20));
  }
  CHECK_EQ(Await(*job, job->mailbox().Flush()).text, "");
  Finish(self, job);
}

void ManyPostedReceives(Rank& self) {
  constexpr uint32_t kCount = 1000;
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const int peer = 1 - self.rank;
  std::vector<TicketPtr> tickets;
  std::vector<Buffer> buffers;
  for (uint32_t i = 0; i < kCount; ++i) {
    buffers.push_back(TextBuffer("????"));
    auto route = std::make_shared<Route>(Route{peer, i, ""});
    tickets.push_back(job->mailbox().Recv(route, Part::kPayload, buffers.back()));
  }
  self.Meet();
  for (uint32_t i = kCount; i-- > 0;) {
    std::string text = std::to_string(1000 + i);
    self.Send(*job, peer, i, text);
  }
  for (uint32_t i = 0; i < kCount; ++i) {
    CHECK_EQ(Await(*job, tickets[i]).text, "");
    const auto text = std::static_pointer_cast<std::string>(buffers[i].owner);
    CHECK_EQ(*text, std::to_string(1000 + i));
  }
  Finish(self, job);
}

void SynchronousSendsWait(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  if (self.rank == 0) {
    auto route = std::make_shared<Route>(Route{1, 5, ""});
    const TicketPtr ticket = job->mailbox().Send(route, TextBuffer("text"), true);
    CHECK(!ticket->WaitFor(0.2));
    self.Meet();
    CHECK_EQ(Await(*job, ticket).text, "");
  } else {
    self.Meet();
    CHECK_EQ(self.Recv(*job, 0, 5, 4), "text");
  }
  Finish(self, job);
}

void SizesMustAgree(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const std::vector<std::pair<size_t, size_t>> sent_expected = {
      {8, 4}, {4, 8}, {kLarge, 4}, {4, kLarge}, {kLarge, kLarge - 1}};
  // The first time the receives come first, the second time the sends.
  for (uint32_t channel : {10u, 20u}) {
    if (self.rank == 0) {
      if (channel == 10) self.Meet();
      for (const auto& [sent, expected] : sent_expected) {
        self.Send(*job, 1, channel++, std::string(sent, 's'));
      }
      if (channel > 20) self.Meet();
    } else {
      if (channel == 20) self.Meet();
      std::vector<TicketPtr> tickets;
      for (const auto& [sent, expected] : sent_expected) {
        auto route = std::make_shared<Route>(Route{0, channel++, "x"});
        tickets.push_back(job->mailbox().Recv(route, Part::kPayload,
                                              TextBuffer(std::string(expected, '?'))));
      }
      if (channel < 20) self.Meet();
      for (size_t i = 0; i < tickets.size(); ++i) {
        const Status status = Await(*job, tickets[i]);
        CHECK(status.code == Code::kDataLoss);
        const auto& [sent, expected] = sent_expected[i];
        const std::string sizes = "sent_bytes=" + std::to_string(sent) +
                                  " expected_bytes=" + std::to_string(expected);
        if (status.text.find(sizes) == std::string::npos) CHECK_EQ(status.text, sizes);
      }
    }
  }
  Finish(self, job);
}

void DataGoesThroughSharedMemory(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const std::string text = job->Describe(1 - self.rank);
  const size_t monitor = text.find("; monitor: ");
  CHECK(monitor != std::string::npos);
  const std::string data = text.substr(0, monitor);
  CHECK(data.find("sysv/") != std::string::npos ||
        data.find("posix/") != std::string::npos);
  CHECK_EQ(text.substr(monitor), "; monitor: tcp/lo");
  Finish(self, job);
}

void OpensAgainAfterClose(Rank& self) {
  for (int round = 0; round < 3; ++round) {
    JobPtr job;
    self.options.job_id = "round " + std::to_string(round);
    CHECK_EQ(self.Join(&job).text, "");
    self.Send(*job, (self.rank + 1) % 3, 1, self.options.job_id);
    CHECK_EQ(self.Recv(*job, (self.rank + 2) % 3, 1, self.options.job_id.size()),
             self.options.job_id);
    Finish(self, job);
  }
}

void OneRankAlone(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  CHECK_EQ(Await(*job, job->mailbox().Flush()).text, "");
  CHECK(self.TryRecv(*job, 0, 1).code == Code::kInvalid);
  Finish(self, job);
}

// Requests that complete while another thread cancels them: each ends once, one way or
// the other, and its message is not lost on the next one.
void CancelsRaceWithCompletion(Rank& self) {
  constexpr uint32_t kRounds = 3000;
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const int peer = 1 - self.rank;
  std::atomic<int> done{0}, cancelled{0};
  std::vector<TicketPtr> tickets(kRounds);
  std::atomic<uint32_t> posted{0};
  std::thread canceller([&] {
    std::mt19937 random(self.rank);
    for (uint32_t i = 0; i < kRounds; ++i) {
      while (posted <= i) std::this_thread::yield();
      if (random() % 2) job->mailbox().Cancel(tickets[i], {Code::kCancelled, "cancel"});
    }
  });
  for (uint32_t i = 0; i < kRounds; ++i) {
    auto route = std::make_shared<Route>(Route{peer, i, ""});
    tickets[i] = job->mailbox().Recv(route, Part::kPayload,
                                     TextBuffer(std::string(i % 7 ? 64 : 20000, '?')));
    tickets[i]->OnFinish([&](const Status& status) {
      CHECK(status.ok() || status.code == Code::kCancelled);
      ++(status.ok() ? done : cancelled);
    });
    posted = i + 1;
    self.Send(*job, peer, i, std::string(i % 7 ? 64 : 20000, 's'));
  }
  self.Meet();
  canceller.join();
  for (const TicketPtr& ticket : tickets) CHECK(ticket->WaitFor(30));
  while (done + cancelled < static_cast<int>(kRounds)) std::this_thread::yield();
  self.Meet();
  // The large messages whose receive was cancelled will never be complete.
  CHECK_EQ(job->Close(0.5).text, "");
  self.Meet();
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  RunRanks("messages of all sizes", 2, MessagesOfAllSizes);
  RunRanks("sends never wait for receives", 2, SendsNeverWaitForReceives);
  RunRanks("many posted receives", 2, ManyPostedReceives);
  RunRanks("synchronous sends wait", 2, SynchronousSendsWait);
  RunRanks("sizes must agree", 2, SizesMustAgree);
  RunRanks("data goes through shared memory", 2, DataGoesThroughSharedMemory);
  RunRanks("opens again after close", 3, OpensAgainAfterClose);
  RunRanks("one rank alone", 1, OneRankAlone);
  RunRanks("cancels race with completion", 2, CancelsRaceWithCompletion);
}
