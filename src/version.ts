import manifest from '../package.json' with { type: 'json' };

/** Kiln's version, from package.json. */
export const kilnVersion: string = manifest.version;
