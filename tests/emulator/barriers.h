// mbarriers, which are kept outside of shared memory, where a mark tells whether anything wrote
// over them; named barriers and __syncthreads.
#ifndef MLSTM_TESTS_EMULATOR_BARRIERS_H
#define MLSTM_TESTS_EMULATOR_BARRIERS_H

#include <cstdint>
#include <string>

#include "races.h"

namespace emu {

void barriers_start();
void end_of_thread_barriers();

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier);
void barrier_expect(uint32_t barrier, uint32_t bytes);  // and arrives
void barrier_wait(uint32_t barrier, uint32_t parity);

// For the copy engine: the agent of a barrier's loads, and the bytes of one that are there.
int barrier_agent(uint32_t barrier);
void barrier_complete(uint32_t barrier, uint32_t bytes, const Clock& clock);

void named_sync(uint32_t number, int count);
void sync_threads();

// For a deadlock's report: mbarriers on which something has arrived and something not.
std::string unfinished_phases();

}  // namespace emu

#endif
