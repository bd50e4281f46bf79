import { defineConfig } from 'vitest/config';

/** What is polled for comes in milliseconds, unless the machine is busy. */
const patient = { poll: { timeout: 10_000 } };

/**
 * Four projects, run one after the other:
 * unit         no root, no virtual machine, a few seconds
 * integration  root, real kernel objects and a real QEMU, but no containerd
 * e2e          real containerd, real virtual machines, one file at a time: under emulation one start costs seconds of
 *              a whole core, and two files side by side would only make each other's time limits meaningless
 * kernels      end-to-end too; last, because scripts/test builds the minimal kernel beside the others
 */
export default defineConfig({
  test: {
    projects: [
      {
        test: {
          name: 'unit',
          include: ['test/unit/**/*.test.ts'],
          expect: patient,
          testTimeout: 60_000,
          sequence: { groupOrder: 0 },
        },
      },
      {
        test: {
          name: 'integration',
          include: ['test/integration/**/*.test.ts'],
          expect: patient,
          testTimeout: 60_000,
          maxWorkers: 1,
          fileParallelism: false,
          sequence: { groupOrder: 1 },
        },
      },
      {
        test: {
          name: 'e2e',
          include: ['test/e2e/**/*.test.ts'],
          exclude: ['test/e2e/kernels.test.ts'],
          globalSetup: ['test/support/shared-templates.ts'],
          expect: patient,
          testTimeout: 180_000,
          hookTimeout: 180_000,
          maxWorkers: 1,
          fileParallelism: false,
          sequence: { groupOrder: 2 },
        },
      },
      {
        test: {
          name: 'kernels',
          include: ['test/e2e/kernels.test.ts'],
          expect: patient,
          testTimeout: 180_000,
          hookTimeout: 180_000,
          sequence: { groupOrder: 3 },
        },
      },
    ],
  },
});
