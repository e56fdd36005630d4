/* This network rounds once. */
#if !defined(CMSIS_NN_USE_SINGLE_ROUNDING)
#error "this network rounds as R2: compile it and CMSIS-NN with -DCMSIS_NN_USE_SINGLE_ROUNDING"
#endif
