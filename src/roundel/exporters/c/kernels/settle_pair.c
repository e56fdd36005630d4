/* The shifts of a sum of two, x and z: the operand with the larger exponent keeps its own, so no term grows. */
struct settle_pair {
    int32_t shift[3], *now, x, z, y;
};

static void settle_pair(const struct settle_pair *a)
{
    const int32_t one = used_at(a->x), two = used_at(a->z), top = one > two ? one : two;
    a->now[0] = bounded(a->shift[0] + one - top);
    a->now[1] = bounded(a->shift[1] + two - top);
    a->now[2] = bounded(a->shift[2] + top - used_at(a->y));
}
