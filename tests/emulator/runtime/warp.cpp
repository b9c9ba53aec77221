// Meetings of a warp's lanes: the warp barrier, shuffles and votes.
#include "warp.h"

#include "block.h"
#include "settings.h"

namespace emulator {

namespace {

void finish_meeting(Worker* w, Warp& warp, Meeting& meeting, Fiber* except) {
  const unsigned lanes = meeting.arrived;
  meeting.arrived = 0;
  ++meeting.generation;
  if (meeting.finish) meeting.finish(warp.lanes, lanes);
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    Fiber* f = warp.lanes + __builtin_ctz(rest);
    if (f != except) w->make_ready(f);
  }
}

}  // namespace

void meet(Fiber* f, const char* name, unsigned mask, Place place, bool orders,
          void (*finish)(Fiber*, unsigned)) {
  Worker* w = f->worker;
  Warp& warp = w->warps[f->slot / 32];
  const unsigned bit = 1u << lane_of(f);
  if (!(mask & bit)) fail(place, "%s: the calling lane %u is not in the mask %#x", name, lane_of(f), mask);
  const unsigned slot = unsigned(__builtin_ctz(mask));
  Meeting& meeting = warp.meetings[slot];
  if (meeting.arrived && (meeting.mask != mask || differ(meeting.name, name)))
    fail(place, "%s with mask %#x, while other lanes of the warp are at %s with mask %#x", name, mask,
         meeting.name, meeting.mask);
  meeting.name = name;
  meeting.mask = mask;
  meeting.finish = finish;
  meeting.arrived |= bit;
  // Two keys in turn: a lane may be at the next meeting before a slower one has left this one.
  void* key = nullptr;
  if (kThreadSanitizer && (orders || warp_operations_order.load(std::memory_order_relaxed)))
    key = w->meeting_key(f->slot / 32, slot, meeting.generation & 1);
  if (key) order_release(key);
  if (meeting.arrived == (mask & warp.alive))
    finish_meeting(w, warp, meeting, f);
  else
    wait(f, name, place);
  if (key) order_acquire(key);
}

void leave_warp(Fiber* f) {
  Worker* w = f->worker;
  Warp& warp = w->warps[f->slot / 32];
  warp.alive &= ~(1u << lane_of(f));
  for (Meeting& meeting : warp.meetings)
    if (meeting.arrived && meeting.arrived == (meeting.mask & warp.alive))
      finish_meeting(w, warp, meeting, nullptr);
}

void warp_barrier(Site* site, unsigned mask) {
  if (!is_skipped(site)) meet(self(), site->name, mask, site->place, true, nullptr);
}

int lane() { return int(lane_of(self())); }

uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int source, Place place) {
  Fiber* f = self();
  f->value = value;
  f->source = source;
  meet(f, name, mask, place, false, [](Fiber* lanes, unsigned here) {
    for (unsigned rest = here; rest; rest &= rest - 1) {
      Fiber& f = lanes[__builtin_ctz(rest)];
      // What a lane gets that reads one which does not take part is undefined.
      f.result = here >> f.source & 1 ? lanes[f.source].value : 0xFFFFFFFFu;
    }
  });
  return f->result;
}

unsigned vote(const char* name, Vote vote, unsigned mask, bool predicate, Place place) {
  Fiber* f = self();
  f->value = predicate;
  meet(f, name, mask, place, false, [](Fiber* lanes, unsigned here) {
    unsigned votes = 0;
    for (unsigned rest = here; rest; rest &= rest - 1)
      votes |= lanes[__builtin_ctz(rest)].value << __builtin_ctz(rest);
    for (unsigned rest = here; rest; rest &= rest - 1) {
      lanes[__builtin_ctz(rest)].result = votes;
      lanes[__builtin_ctz(rest)].value = here;
    }
  });
  switch (vote) {
    case Vote::kBallot:
      return f->result;
    case Vote::kAny:
      return f->result != 0;
    default:
      return f->result == f->value;
  }
}

}  // namespace emulator
