/* The calls of semihosting.h, and the two functions that compilers call unasked. */
#include "semihosting.h"

int32_t open_file(const char *name, uint32_t mode)
{
    uint32_t length = 0;
    while (name[length]) {
        length++;
    }
    const uintptr_t block[3] = {(uintptr_t)name, mode, length};
    return semihosting(0x01, block);
}

/* How many bytes could not be read. */
uint32_t read_file(int32_t file, void *to, uint32_t bytes)
{
    const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)to, bytes};
    return (uint32_t)semihosting(0x06, block);
}

void write_file(int32_t file, const void *from, uint32_t bytes)
{
    const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)from, bytes};
    if (semihosting(0x05, block)) {
        leave(98);
    }
}

void leave(int status)
{
    const uintptr_t block[2] = {0x20026u, (uintptr_t)status};
    for (;;) {
        semihosting(0x20, block);
    }
}

void *memcpy(void *to, const void *from, size_t bytes)
{
    char *d = to;
    for (const char *s = from; bytes--;) {
        *d++ = *s++;
    }
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    for (char *d = to; bytes--;) {
        *d++ = (char)value;
    }
    return to;
}
