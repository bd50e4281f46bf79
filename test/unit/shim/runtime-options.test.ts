import { expect, it } from 'vitest';
import { Options } from '../../../gen/containerd/runc_details.ts';
import { unheededOptions } from '../../../src/shim/runtime-options.ts';

const endpoint = Buffer.from(Options.encode({ taskApiAddress: 'ttrpc+unix:///s', taskApiVersion: 2 }).finish());
/** binary_name = "r" */
const binary = Buffer.from([0x32, 1, 0x72]);
const runc = 'containerd.runc.v1.Options';

it.each([
  ['none', undefined, undefined],
  ['where the sandbox is served', { typeUrl: runc, value: endpoint }, undefined],
  ['nothing of runc', { typeUrl: `types.containerd.io/${runc}`, value: Buffer.alloc(0) }, undefined],
  ['something of runc', { typeUrl: runc, value: binary }, runc],
  ['something of runc beside', { typeUrl: runc, value: Buffer.concat([binary, endpoint]) }, runc],
  ['what cannot be read', { typeUrl: runc, value: Buffer.from([0x32, 9]) }, runc],
  ["another runtime's", { typeUrl: 'runtimeoptions.v1.Options', value: Buffer.alloc(0) }, 'runtimeoptions.v1.Options'],
])('of options that say %s, somebody may miss what they say: %o', (_what, options, type) => {
  expect(unheededOptions({ options })).toBe(type);
});
