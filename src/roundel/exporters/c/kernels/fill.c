static void fill_X(X *y, int32_t count, int32_t code)
{
    for (int32_t i = 0; i < count; i++) {
        y[i] = (X)code;
    }
}
