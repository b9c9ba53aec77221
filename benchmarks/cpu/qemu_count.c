// A plugin of QEMU's user mode: how many instructions an aarch64 program ran, how many of them were NEON's multiply-adds
// of four floats, and how many were loads. benchmarks/cpu/qemu.py says how to use it.
//
//     gcc -O2 -shared -fPIC -o qemu_count.so benchmarks/cpu/qemu_count.c
//
// Declarations are those of QEMU's plugin interface, version 1, so that nothing of QEMU is needed to build it.

#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define SHOWN __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_insn;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn*);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, int, void*, uint64_t);
void qemu_plugin_register_atexit_cb(uint64_t, void (*)(uint64_t, void*), void*);

SHOWN int qemu_plugin_version = 1;
static uint64_t all, multiply_adds, loads;

static int is_multiply_add(uint32_t word) {
  const int by_vector = (word & 0xFF60FC00u) == 0x4E20CC00u;  // fmla, fmls v.4s, v.4s, v.4s
  return by_vector || (word & 0xFFC0B400u) == 0x4F801000u;    // the same by one element
}

static int is_load(uint32_t word) {  // ld*, and prefetches among them
  return (word & 0x0A000000u) == 0x08000000u && (word & 0x00400000u);
}

// A counter is added to where a block of instructions runs, by what the block holds.
static void translated(uint64_t id, struct qemu_plugin_tb* block) {
  const size_t count = qemu_plugin_tb_n_insns(block);
  uint64_t found[2] = {0, 0};
  for (size_t i = 0; i < count; ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
    found[0] += is_multiply_add(word), found[1] += is_load(word);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &all, count);
  if (found[0]) qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &multiply_adds, found[0]);
  if (found[1]) qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &loads, found[1]);
}

static void left(uint64_t id, void* unused) {
  fprintf(stderr, "counted: instructions %" PRIu64 " multiply_adds %" PRIu64 " loads %" PRIu64 "\n", all, multiply_adds,
          loads);
}

SHOWN int qemu_plugin_install(uint64_t id, const void* info, int argc, char** argv) {
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, left, NULL);
  return 0;
}
