import { expect, it } from 'vitest';
import { defaultConfig } from '../../../src/config/config.ts';
import type { ControlGroup } from '../../../src/host/control-group.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Timeline } from '../../../src/observe/timeline.ts';
import type { HostServices } from '../../../src/sandbox/resources.ts';
import type { Sandbox } from '../../../src/sandbox/sandbox.ts';
import { startSandbox, type VmRequest } from '../../../src/sandbox/start.ts';

const group = {} as ControlGroup;

/** A host whose pool has this sandbox. */
function hostWith(sandbox: Sandbox): HostServices {
  return {
    ...{ templates: { provide: async () => ({}) }, pool: { take: async () => sandbox } },
    clocks: { keep: () => {} },
  } as unknown as HostServices;
}

function request(): VmRequest {
  const logger = loggerTo({ write: () => {} }, 'error');
  return {
    config: defaultConfig,
    timeline: new Timeline(),
    logger,
    files: {},
    controlGroup: group,
  } as unknown as VmRequest;
}

function waiting(enter: (group: ControlGroup) => Promise<void>) {
  const state = { ended: false };
  const sandbox = {
    ...{ vm: { pid: 1, enter }, guest: { facts: {} } },
    [Symbol.asyncDispose]: async () => {
      state.ended = true;
    },
  } as unknown as Sandbox;
  return { state, sandbox };
}

it('a virtual machine from the pool is moved to the control group of who takes it', async () => {
  const entered: ControlGroup[] = [];
  const { sandbox, state } = waiting(async (given) => void entered.push(given));
  expect(await startSandbox(hostWith(sandbox), request(), new AbortController().signal)).toBe(sandbox);
  expect(entered).toEqual([group]);
  expect(state.ended).toBe(false);
});

it('a virtual machine from the pool that cannot be moved is ended', async () => {
  const { sandbox, state } = waiting(() => Promise.reject(new Error('no such group')));
  const taking = startSandbox(hostWith(sandbox), request(), new AbortController().signal);
  await expect(taking).rejects.toThrow('no such group');
  expect(state.ended).toBe(true);
});
