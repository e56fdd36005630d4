/* How full a site's range is: codes from low down and from high up are saturated, quiet is a peak that leaves room for a finer unit. */
struct observe {
    int32_t count, zero, low, high, limit, quiet, site, bound, most_up, most_down;
};

static void observe_Y(const struct observe *a, const Y *codes)
{
    struct site *site = &sites[a->site];
    int32_t saturated = 0, peak = 0;
    for (int32_t i = 0; i < a->count; i++) {
        const int32_t code = codes[i], far = code < a->zero ? a->zero - code : code - a->zero;
        saturated += (code <= a->low) + (code >= a->high);
        peak = far > peak ? far : peak;
    }
    site->up = (int8_t)(saturated > a->limit ? site->up + 1 : 0);
    site->down = (int8_t)(saturated <= a->limit && peak <= a->quiet ? site->down + 1 : 0);
    if (site->up == a->most_up || site->down == a->most_down) {
        const int32_t next = site->used + (site->up == a->most_up ? 1 : -1);
        site->next = (int8_t)(next > a->bound ? a->bound : next < -a->bound ? -a->bound : next);
        site->up = site->down = 0;
    }
}
