import { describe, expect, it } from 'vitest';
import { findNodes, lookAtDevice } from '../../../src/host/block-devices.ts';

describe("the host's block devices", () => {
  it('are none of these: another device, a directory, a path where nothing is', async () => {
    const nodeAt = await findNodes(['/dev/null', '/dev', '/nowhere']);
    for (const path of ['/dev/null', '/dev', '/nowhere', '/other']) expect(nodeAt(path)).toBeUndefined();
  });

  it('that are not there are named by what asks for them', async () => {
    const at = 'linux.devices[0]: /dev/x';
    await expect(lookAtDevice({ major: 4095, minor: 1, readOnly: false, at })).rejects.toMatchObject({
      code: 'not-found',
      message: 'linux.devices[0]: /dev/x (b 4095:1): the host has no such block device',
    });
  });
});
