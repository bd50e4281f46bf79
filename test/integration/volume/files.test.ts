import { readFileSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { Share } from './share.ts';

const shares: Share[] = [];
afterEach(async () => {
  for (const share of shares.splice(0)) await share[Symbol.asyncDispose]();
});

async function share(): Promise<Share> {
  const made = await Share.make();
  shares.push(made);
  return made;
}

describe('a volume', () => {
  test('shows the files of the host, and the host what the guest writes', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'from-host'), 'hello');
    const fid = await client.open('0/from-host', 0);
    expect((await client.read(fid, 0, 100)).toString()).toBe('hello');
    const made = await client.create('0/from-guest', { mode: 0o640 });
    await client.write(made, 0, 'answer');
    expect(readFileSync(path.join(source, 'from-guest'), 'utf8')).toBe('answer');
    expect(statSync(path.join(source, 'from-guest')).mode & 0o7777).toBe(0o640);
  });
});
