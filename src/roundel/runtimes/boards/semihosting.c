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

#if defined(__ARM_FEATURE_UNALIGNED)
typedef uint32_t __attribute__((may_alias, aligned(1))) word_t;
#define WORDS(bytes) ((bytes) & ~(size_t)3) /* such a core reads words at any address, and so do C libraries for it */
#else
typedef char word_t;
#define WORDS(bytes) 0
#endif

void *memcpy(void *to, const void *from, size_t bytes)
{
    char *d = to;
    const char *s = from;
    for (const char *whole = s + WORDS(bytes); s < whole; d += 4, s += 4) {
        *(word_t *)d = *(const word_t *)s;
    }
    for (const char *end = (const char *)from + bytes; s < end;) {
        *d++ = *s++;
    }
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    char *d = to;
    for (char *whole = d + WORDS(bytes); d < whole; d += 4) {
        *(word_t *)d = (word_t)((unsigned char)value * 0x01010101u);
    }
    for (char *end = (char *)to + bytes; d < end;) {
        *d++ = (char)value;
    }
    return to;
}
