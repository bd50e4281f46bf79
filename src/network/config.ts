/** The network of a sandbox, as its guest takes it over. Addresses are their 4 or 16 bytes. */

export interface NetworkAddress {
  readonly local: Uint8Array;
  /** The other end's, where that is another one; else the same. */
  readonly peer: Uint8Array;
  readonly prefixLength: number;
  /** Empty for none. */
  readonly broadcast: Uint8Array;
  /** linux/rtnetlink.h, rt_scope_t. */
  readonly scope: number;
}

export interface NetworkInterface {
  /** The MAC by which the guest finds the card, until it has the interface's own. */
  readonly cardMac: string;
  readonly name: string;
  readonly mac: string;
  /** In bytes. */
  readonly mtu: number;
  readonly addresses: readonly NetworkAddress[];
}

export interface NetworkRoute {
  /** The interface's name. */
  readonly interface: string;
  /** AF_INET or AF_INET6. */
  readonly family: number;
  /** Empty for the default route. */
  readonly destination: Uint8Array;
  readonly prefixLength: number;
  /** Empty for one on the link. */
  readonly gateway: Uint8Array;
  /** The source address that is preferred; empty for none. */
  readonly source: Uint8Array;
  /** The metric; 0 for none. */
  readonly priority: number;
  readonly scope: number;
  /** RTNH_F_ONLINK. */
  readonly flags: number;
}

export interface NetworkNeighbour {
  /** The interface's name. */
  readonly interface: string;
  readonly address: Uint8Array;
  readonly mac: string;
}

export interface NetworkConfig {
  readonly interfaces: readonly NetworkInterface[];
  /** In an order in which they can be set: a gateway's own route comes before what goes through it. */
  readonly routes: readonly NetworkRoute[];
  readonly neighbours: readonly NetworkNeighbour[];
}
