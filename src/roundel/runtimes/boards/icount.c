/* QEMU plugin: instructions so far each time the guest reaches the address mark, one line each. The few functions of the plugin
 * interface that it needs are declared here, since distributions leave the header out. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
typedef struct qemu_info_t qemu_info_t;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*call)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t amount);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*call)(plugin_id, void *), void *data);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, void (*call)(unsigned, void *), int flags, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);

int qemu_plugin_version = 1;

struct block {
    uint64_t instructions, runs;
    struct block *before;
};
static struct block *last;
static uint64_t mark;
static FILE *file;

static void marked(unsigned cpu, void *data)
{
    uint64_t total = 0;
    (void)cpu;
    (void)data;
    for (const struct block *block = last; block; block = block->before) {
        total += block->instructions * block->runs;
    }
    fprintf(file, "%" PRIu64 "\n", total);
}

static void translated(plugin_id id, struct qemu_plugin_tb *code)
{
    struct block *block = calloc(1, sizeof *block);
    (void)id;
    block->instructions = qemu_plugin_tb_n_insns(code);
    block->before = last;
    last = block;
    qemu_plugin_register_vcpu_tb_exec_inline(code, 0, &block->runs, 1);
    if (qemu_plugin_tb_vaddr(code) == mark) {
        qemu_plugin_register_vcpu_tb_exec_cb(code, marked, 0, NULL);
    }
}

static void done(plugin_id id, void *data)
{
    (void)id;
    (void)data;
    fclose(file);
}

int qemu_plugin_install(plugin_id id, const qemu_info_t *info, int count, char **words)
{
    (void)info;
    for (int i = 0; i < count; i++) {
        if (!strncmp(words[i], "out=", 4)) {
            file = fopen(words[i] + 4, "w");
        } else if (!strncmp(words[i], "mark=", 5)) {
            mark = strtoull(words[i] + 5, NULL, 0);
        }
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, done, NULL);
    return file ? 0 : 1;
}
