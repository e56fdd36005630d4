/* The shift of a kernel that has one, under the exponents of its operands x and z and its result y, -1 where there is none. */
struct settle_one {
    int32_t shift, *now, x, z, y;
};

static void settle_one(const struct settle_one *a)
{
    *a->now = bounded(a->shift + used_at(a->x) + used_at(a->z) - used_at(a->y));
}
